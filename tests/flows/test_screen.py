"""The screen shows what is in the data as it is, in full, and never ends a command."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from rich.table import Table

from ddpo.config.files import read_config
from ddpo.runs import start_run
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.cli import bars, screen

STARTER = "configs/starter.yaml"
LONG = "a-run-with-a-name-that-says-what-was-tried-and-with-which-learning-rate-1e-4"
MARKUP = "[/x] [bold]y[/bold] :cat: \\[z]"


@pytest.fixture
def ddpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process; gives exit status and what the screen showed."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return int(ended.value.code or 0), shown.out + shown.err

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store whose path looks like markup, with a run of a long name."""
    store = tmp_path / MARKUP / "store"
    start_run(read_config(STARTER, [f"storage={{root: '{store}'}}"]), LONG)
    return store


@pytest.fixture
def as_started(monkeypatch: pytest.MonkeyPatch):
    """Puts a stream in place of standard output, as a command finds it when it starts."""

    def put(stream: io.TextIOWrapper) -> None:
        monkeypatch.setattr(sys, "stdout", stream)
        screen.set_up()

    return put


@pytest.mark.parametrize("tree", [(), ("--tree",)])
def test_the_list_of_runs_names_each_in_full(ddpo, root: Path, tree: tuple[str, ...]):
    status, shown = ddpo("runs", *tree, "--root", root)
    assert status == 0
    assert LONG in shown
    assert f"file://{root}" in shown


def test_a_table_in_a_pipe_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]):
    table = Table("name", "note")
    table.add_row("n" * 100, "words " * 40 + "end")
    screen.show(table, fold=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "n" * 100 in lines[3] and lines[3].count("words") == 40


def test_places_are_shown_in_full(capsys: pytest.CaptureFixture[str], root: Path):
    screen.show_places({"report": f"{root}/{'p' * 200}", "look": "ddpo ui"})
    assert capsys.readouterr().out.splitlines() == [
        f"report  {root}/{'p' * 200}",
        "look    ddpo ui",
    ]


def test_nothing_on_the_screen_is_read_as_markup(capsys: pytest.CaptureFixture[str]):
    screen.say(MARKUP)
    screen.say(MARKUP, style="bold")
    table = Table(MARKUP)
    table.add_row(MARKUP)
    screen.show(table)
    shown = bars.Bars(screen.console, MARKUP, 3)
    with screen.busy(MARKUP) as update:
        update(MARKUP)
    with shown:
        shown.stage("sample", 1, 2)
        shown.epoch(1, 3, {"reward/mean": 0.5})
    assert capsys.readouterr().out.count(MARKUP) == 4


def test_control_characters_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]):
    screen.say("a\x1b[2Jb\x07\x9bc")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\\x9bc\n"


def test_a_screen_of_ascii_shows_the_rest_by_its_code(as_started):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    as_started(stream)
    screen.say("a … \u732b \ud800")
    table = Table("…")
    table.add_row("é")
    screen.show(table)
    with bars.Bars(screen.console, "n…" * 100, 3):
        pass
    print("a reward prints ≥")
    stream.flush()
    shown = stream.buffer.getvalue().decode("ascii")  # pyright: ignore
    assert shown.startswith("a \\u2026 \\u732b \\ud800\n+")
    assert "\\xe9" in shown and "\\u2265" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device without room")
@pytest.mark.parametrize("gone", ["a full disk", "a closed pipe"])
def test_a_screen_that_is_gone_ends_nothing(as_started, gone: str):
    if gone == "a full disk":
        stream = open("/dev/full", "w")  # noqa: PTH123, SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    as_started(stream)
    with stream, bars.Bars(screen.console, "night", 3) as shown:
        for number in range(3):
            screen.say("line " * 10_000)
            shown.epoch(number, 3, {})


def test_our_own_warnings_are_seen_beside_prefects_which_are_not(
    ddpo, capsys: pytest.CaptureFixture[str]
):
    import prefect  # noqa: F401  # sets up logging

    ddpo("--help")
    logging.getLogger("ddpo.store.anything").warning("kept %s", MARKUP)
    logging.getLogger("ddpo_workflow.flows.anything").warning("once")
    logging.getLogger("ddpo.store.anything").info("not shown")
    logging.getLogger("prefect.engine").warning("not shown")
    assert capsys.readouterr().err.splitlines() == [f"warning: kept {MARKUP}", "warning: once"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--out", "."), "--out must be a file that ends in .png"),
        (("--out", "{folder.png}"), "--out must be a file that ends in .png"),
        (("--out", "{file}/below/a.png"), "a.png cannot be written: Not a directory"),
        (("--out", "{a.png}", "--seed", 2**63), "less than or equal to 9223372036854775807"),
        (("--out", "{a.png}", "--prompt", "\udcff"), "is not Unicode text"),
        (("--out", "{a.png}", "--prompt", " "), "text that is not blank"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_in_one_line(
    ddpo, root: Path, tmp_path: Path, words: tuple[object, ...], told: str
):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("in the way")
    placed = [re.sub(r"\{(.+)\}", rf"{tmp_path}/\1", str(word)) for word in words]
    prompt = () if "--prompt" in words else ("--prompt", "a cat")
    status, shown = ddpo("sample", LONG, *prompt, *placed, "--root", root)
    assert status == 2
    assert told in " ".join(shown.replace("│", "").split())


def test_a_picture_with_more_text_than_pillow_reads_is_refused_in_one_line(ddpo, tmp_path: Path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat, " * 300_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a1111.png", pnginfo=info)
    status, shown = ddpo("score", "jpeg_compressibility", tmp_path / "a1111.png", "--prompt", "x")
    assert status == 2
    assert f"cannot read {tmp_path}/a1111.png as an image" in shown


def test_a_config_without_seeds_of_pictures_is_refused(ddpo):
    status, shown = ddpo("train", STARTER, "--set", "tracking.pictures.seeds=[]")
    assert status == 2
    assert "tracking.pictures.seeds" in shown


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_seeds_have_63_bits(ddpo, seed: int):
    for key, value in (("seed", seed), ("tracking.pictures.seeds", [seed])):
        status, shown = ddpo("train", STARTER, "--set", f"{key}={value}")
        assert status == 2
        assert key in shown


def test_a_database_that_is_none_is_refused_in_one_line(ddpo, tmp_path: Path):
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    address = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    status, shown = ddpo("train", STARTER, "--set", address, "--root", tmp_path / "store")
    assert status == 2
    assert "not a database" in shown and len(shown.splitlines()) <= 3


def test_only_the_screen_prints():
    for file in Path("flows/cli").glob("*.py"):
        if file.name != "screen.py":
            found = re.findall(r"Console\(|console\.(?:print|status)|from_markup", file.read_text())
            assert not found, file
