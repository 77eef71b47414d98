"""Text in pictures, read by the real Tesseract where it is installed."""

import itertools
import os
import shutil
import stat
import textwrap

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.builtin.ocr import asked_text, edit_distance, fold

tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None,
    reason="the program tesseract is not installed (apt-get install tesseract-ocr)",
)


def sign(text, ink="black", ground="white", side=256):
    picture = Image.new("RGB", (side, side), ground)
    font = ImageFont.load_default(side // 6)
    ImageDraw.Draw(picture).text((side // 2, side // 2), text, ink, font, anchor="mm")
    return picture


def asks(text):
    return Prompt(f'a sign that says "{text}"')


@pytest.mark.parametrize(
    ("prompt", "metadata", "expected"),
    [
        ('a sign that says "Open Late"', {}, "Open Late"),
        ("a sign that says “Open” and ‘Late’", {}, "Open Late"),
        ("ein Schild mit „Offen“ und «Ouvert»", {}, "Offen Ouvert"),
        ("the dog's sign says 'OPEN'.", {}, "OPEN"),
        ("the dogs' sign and the cat's", {}, None),
        ('an empty " " sign', {}, None),
        ('a sign that says "Open"', {"text": "Closed"}, "Closed"),
        ("a sign", {"text": " "}, None),
        ("a sign", {"text": 3}, None),
    ],
)
def test_text_comes_from_metadata_or_from_quotes(prompt, metadata, expected):
    assert asked_text(Prompt(prompt, metadata)) == expected


def test_case_white_space_and_look_alikes_do_not_count():
    assert fold(" Open\n LATE\f") == fold("openlate")
    assert fold("Straße ﬁ Ａ") == fold("STRASSE FI a")
    assert fold("open!") != fold("open")


def test_edit_distance_is_the_fewest_edits():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("abc", "abc") == 0
    # Against an exhaustive search: all texts that n edits reach, for n = 0, 1, 2, ...
    alphabet, start = "ab", "aba"
    reached, distances, edits = {start}, {start: 0}, 0
    while edits < 3:
        edits += 1
        following = set()
        for text in reached:
            for place in range(len(text) + 1):
                following |= {text[:place] + letter + text[place:] for letter in alphabet}
                following.add(text[:place] + text[place + 1 :])
                following |= {text[:place] + letter + text[place + 1 :] for letter in alphabet}
        reached = following
        for text in following:
            distances.setdefault(text, edits)
    short = ["".join(t) for n in range(5) for t in itertools.product(alphabet, repeat=n)]
    assert {text: edit_distance(start, text) for text in short} == {
        text: distances[text] for text in short
    }


@tesseract
def test_what_is_written_is_read_and_compared():
    images = [
        sign("OPEN LATE"),
        sign("OPEN\nLATE", "white", "navy"),
        sign("OPEN"),
        sign(""),
        sign("SOMETHING\nQUITE OTHER\nAND LONG"),
    ]
    prompts = [asks("open late")] * 5
    scores = score_images(load_reward("ocr_text", {}), images, prompts)
    assert scores.columns["ocr_text"][:4] == ["OPEN LATE", "OPEN LATE", "OPEN", ""]
    assert scores.columns["ocr_asked"] == ["open late"] * 5
    assert scores.columns["ocr_distance"][:4] == [0, 0, 4, 8]
    assert scores.values.tolist() == [1, 1, 0.5, 0, 0]  # never below 0
    assert scores.columns["ocr_distance"][4] > 8
    assert not scores.failed.any()


@tesseract
def test_a_prompt_without_text_and_a_damaged_picture_fail_alone(tmp_path):
    sign("OPEN").save(tmp_path / "whole.png")
    half = tmp_path / "half.png"
    half.write_bytes((tmp_path / "whole.png").read_bytes()[:400])
    images = [sign("OPEN"), Image.open(half), sign("OPEN")]
    prompts = [asks("OPEN"), asks("OPEN"), Prompt("a sign")]
    scores = score_images(load_reward("ocr_text", {}), images, prompts)
    assert scores.failed.tolist() == [False, True, True]
    assert scores.values[0] == 1
    whole, damaged, untold = scores.columns["ocr_error"]
    assert whole == ""
    assert "cannot decode the image" in damaged
    assert "asks for no text" in untold
    assert scores.columns["ocr_distance"][1:] == [None, None]


@tesseract
def test_company_and_repetition_change_nothing():
    reward = load_reward("ocr_text", {})
    rng = np.random.default_rng(0)
    images = [sign("OPEN"), Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8))]
    prompts = [asks("OPEN")] * 2
    together = score_images(reward, images * 2, prompts * 2).columns["ocr_text"]
    assert together[:2] == together[2:]
    alone = [score_images(reward, [i], prompts[:1]).columns["ocr_text"][0] for i in images]
    assert together[:2] == alone


@tesseract
def test_identity_names_the_reader_its_data_and_the_parameters():
    identity = load_reward("ocr_text", {}).identity
    assert set(identity.revisions) == {"tesseract", "eng.traineddata"}
    assert identity.revisions["tesseract"][0].isdigit()
    assert len(identity.revisions["eng.traineddata"]) == 64
    assert load_reward("ocr_text", {"page_mode": "line"}).identity.digest != identity.digest


@tesseract
def test_a_language_that_is_not_installed_is_refused():
    with pytest.raises(ConfigError, match=r"language xyz; it has .*eng.*tesseract-ocr-xyz"):
        load_reward("ocr_text", {"language": "eng+xyz"})


def test_without_tesseract_the_way_out_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"not installed.*apt-get install tesseract-ocr"):
        load_reward("ocr_text", {})


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A program in Tesseract's place that misbehaves by the first byte of the picture's pixels."""
    program = tmp_path / "tesseract"
    program.write_text(
        textwrap.dedent(
            """\
            #!/bin/sh
            case "$1" in
              --version) echo "tesseract 9.9"; exit 0;;
              --list-langs) echo 'List of languages in "/nowhere/" (1):'; echo eng; exit 0;;
            esac
            case "$(tail -c 1)" in
              s) exec sleep 30;;
              c) echo "out of ideas" >&2; exit 7;;
              *) echo "threads $OMP_THREAD_LIMIT";;
            esac
            """
        )
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


def ending_in(letter):
    return Image.new("RGB", (2, 2), (ord(letter),) * 3)


def test_a_crash_fails_alone(stand_in):
    images = [ending_in("c"), ending_in("x")]
    scores = score_images(load_reward("ocr_text", {}), images, [asks("threads 1")] * 2)
    assert scores.failed.tolist() == [True, False]
    assert scores.columns["ocr_error"] == ["tesseract ended with 7: out of ideas", ""]
    assert scores.values[1] == 1  # one thread, as the environment told it


def test_a_hang_fails_when_its_time_is_over(stand_in):
    reward = load_reward("ocr_text", {"timeout_s": 0.5})
    scores = score_images(reward, [ending_in("s")], [asks("x")])
    assert scores.failed.tolist() == [True]
    assert scores.columns["ocr_error"] == ["tesseract took more than 0.5 s"]


def test_a_reader_that_vanished_stops_the_task(stand_in):
    reward = load_reward("ocr_text", {})
    stand_in.unlink()
    with pytest.raises(RewardError, match=r"cannot start .*apt-get install"):
        score_images(reward, [ending_in("x")], [asks("x")])
