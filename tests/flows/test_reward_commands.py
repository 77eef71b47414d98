"""`ddpo rewards` and `ddpo score`, as a user types them."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ddpo.analysis.reward_range import measure_range
from ddpo.config.files import read_config
from ddpo.prompts import Prompt
from ddpo.rewards import available_rewards, load_reward, score_images
from ddpo.rewards.catalogue import describe_rewards, read_image
from ddpo.runs import Run, RunHandle, start_run
from ddpo.store.kinds import ROLLOUTS
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.start import start

OWN = '''
import numpy as np
from ddpo.rewards import Scores

def words(images, prompts, scale: float = 1.0):
    """Reward = length of the prompt.

    More of it.
    """
    failed = np.array(["[bold]" in prompt.text for prompt in prompts])
    counts = [scale * len(prompt.text) for prompt in prompts]
    return Scores(counts, failed, {"asked": [f"[{p.text}] {dict(p.metadata)}" for p in prompts]})

def unreadable(images, prompts, size: "Nowhere" = None):
    return [1.0] * len(images)

def all_fail(images, prompts):
    return Scores(np.zeros(len(images)), np.full(len(images), True))
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_tried_fixture.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_tried_fixture", raising=False)
    return "own_tried_fixture"


@pytest.fixture
def ddpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process; gives exit status and what the screen showed."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Grey, red, half red and half green, and the latter once more as a JPEG."""
    bands = np.zeros((8, 8, 3), np.uint8)
    bands[:, :4, 0], bands[:, 4:, 1] = 255, 255
    made = {"grey.png": Image.new("RGBA", (8, 8), (9, 9, 9, 255))}
    made["red.png"] = Image.new("RGB", (8, 8), (255, 0, 0))
    made["bands.png"] = Image.fromarray(bands)
    made["bands.jpg"] = Image.fromarray(bands)
    for name, image in made.items():
        image.save(tmp_path / name)
    return [tmp_path / name for name in made]


@pytest.fixture(scope="module")
def drawn(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has drawn epochs 0 and 1, two shards of two samples each, and scored nothing."""
    root = tmp_path_factory.mktemp("drawn")
    settings = {
        "model": f"{{path: {tiny_model}}}",
        "storage.root": root / "store",
        "outputs": root / "outputs",
        "sampler.steps": 2,
        "sampler.window": "null",
        "rollouts.samples_per_epoch": 4,
        "rollouts.shard_size": 2,
        "numerics.sample_batch_size": 2,
        "numerics.micro_batch_size": 2,
        "numerics.threads": 1,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    run = start_run(read_config("configs/starter.yaml", words), "drawn")
    handle = RunHandle(root=run.store.root, s3=run.store.s3, run_id=run.run_id)
    checkpoint = start.fn(handle)
    for epoch in (0, 1):
        for shard in (0, 1):
            sample_shard.fn(handle, checkpoint, epoch, shard)
    return run


def kilobytes(run: Run, *epochs: int) -> np.ndarray:
    """Return the JPEG sizes of a run's pictures, read from the tables as anybody would."""
    import pyarrow.parquet as pq

    sizes = []
    for epoch in epochs:
        folder = (
            Path(run.store.root.removeprefix("file://"))
            / ROLLOUTS.data_folder("rollouts", run.run_id)
            / f"epoch={epoch:05d}"
        )
        for file in sorted(folder.glob("*.parquet")):
            for picture in pq.ParquetFile(file).read().column("image").to_pylist():
                buffer = io.BytesIO()
                Image.open(io.BytesIO(picture["bytes"])).save(buffer, "JPEG", quality=95)
                sizes.append(buffer.tell() / 1000)
    return np.array(sizes, np.float32).astype(float)


def test_rewards_are_listed_with_parameters_defaults_and_needs(ddpo):
    status, screen = ddpo("rewards")
    assert status == 0
    lines = screen.splitlines()
    assert {line for line in lines if line and not line.startswith(" ")} == set(available_rewards())
    ocr = lines[lines.index("ocr_text") + 1 :][:5]
    assert ocr[0].startswith("    Reward = 1 - edits")
    assert "needs: the program tesseract" in ocr[1]
    assert '    - language: str; default "eng"' in ocr
    assert "    - rewards: tuple[Component, ...]; required" in lines
    assert any("Literal['species', 'activity', 'count']" in line for line in lines)


NEEDS = {
    "disc_match": "prompts with a disc (`colored_discs`)",
    "http": "a running reward service",
    "openai_vlm": "a server of a vision-language model",
    "ocr_text": "the program tesseract",
    "preference": "preference pairs (`preferences` in the config)",
    "weighted": "what its components need",
    "starter_vqa": "prompts of the starter's scenes",
    "laion_aesthetic": "(1.7 GB) and the head (4 MB), fetched",
    "clip_score": "(1.7 GB), fetched",
    "pickscore": "(3.9 GB), fetched",
    "hps_v2": "(2.0 GB) and CLIP's tokenizer, fetched",
    "image_reward": "(1.8 GB) and BERT's tokenizer, fetched",
    "vlm_alignment": "14 GB) and a model for BERTScore (3 GB), fetched",
    "vlm_vqa": "14 GB), fetched",
}
NOTHING_NEEDED = {"jpeg_compressibility", "jpeg_incompressibility", "colorfulness"}


def test_every_reward_with_weights_or_a_service_says_what_it_needs(ddpo):
    """A new reward belongs in one of the two tables above."""
    ours = {each.name: each.needs for each in describe_rewards()}
    assert ours.keys() == NEEDS.keys() | NOTHING_NEEDED
    for name, needed in NEEDS.items():
        assert needed in ours[name], name
    assert {name for name, needs in ours.items() if not needs} == NOTHING_NEEDED
    _, screen = ddpo("rewards")
    assert "needs: a running reward service (`ddpo serve-reward NAME`)" in " ".join(screen.split())


def test_sizes_of_weights_are_those_of_the_documentation():
    """Both tell what is fetched; `docs/rewards.md` has it in the table of models."""
    size = re.compile(r"[0-9.]+ [GM]B")
    rows = [line.split("|") for line in Path("docs/rewards.md").read_text().splitlines()]
    told = {row[1].strip(" `"): set(size.findall(row[2])) for row in rows if len(row) > 4}
    fetched = {each.name: set(size.findall(each.needs)) for each in describe_rewards()}
    compared = {name for name, sizes in fetched.items() if sizes} - {"openai_vlm"}
    assert len(compared) >= 7
    for name in compared:
        assert fetched[name] <= told[name], name


def test_a_reward_of_another_package_is_described_or_says_why_not(own, tmp_path):
    info = tmp_path / "own_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    points = f"words = {own}:words\nodd = {own}:unreadable\nbroken = nowhere_at_all:thing\n"
    (info / "entry_points.txt").write_text(f"[ddpo.rewards]\n{points}")
    found = {each.name: each for each in describe_rewards()}
    assert found["words"].summary == "Reward = length of the prompt."
    assert found["words"].needs == ""
    (scale,) = found["words"].parameters
    assert (scale.name, scale.type, scale.default) == ("scale", "float", "1.0")
    (size,) = found["odd"].parameters
    assert (size.type, size.default) == ("'Nowhere'", "null")
    assert found["odd"].summary == ""
    assert "no module 'nowhere_at_all'" in found["broken"].summary
    assert found["broken"].parameters == ()


def test_score_shows_a_few_pictures_beside_each_other(ddpo, pictures):
    status, screen = ddpo("score", "colorfulness", *pictures[:3], "--prompt", "a cat")
    assert status == 0
    cells = [line.split("│") for line in screen.splitlines() if line.startswith("│")]
    rows = {name.strip(): texts for _, name, *texts, _ in cells}
    rewards = [float(text) for text in rows["reward"]]
    images = [Image.open(path) for path in pictures[:3]]
    expected = score_images(load_reward("colorfulness", {}), images, [Prompt("x")] * 3)
    assert rewards == [float(f"{value:.4g}") for value in expected.values]
    assert rewards[0] == 0 and rewards[2] == 293.2  # 255 + 0.3 * 127.5
    assert [float(text) for text in rows["rg_mean"]] == [0, 255, 0]


def test_score_shows_many_pictures_below_each_other(ddpo, pictures):
    many = [*pictures, *pictures[:1]]
    status, screen = ddpo("score", "jpeg_compressibility", *many, "--prompt", "a cat")
    assert status == 0
    head, *rows = [line for line in screen.splitlines() if line[0] in "┃│" and line[-1] in "┃│"]
    assert head.replace("┃", " ").split() == ["reward", "jpeg_kb"]
    cells = [row.split("│")[-3:-1] for row in rows if row.split("│")[-3].strip()]
    assert len(cells) == 5
    assert all(float(reward) == -float(kb) < 0 for reward, kb in cells)


def test_prompts_metadata_and_parameters_reach_the_reward(ddpo, own, pictures):
    status, screen = ddpo(
        "score", f"{own}:words", *pictures[:2], "--prompt", "one two", "--prompt", "[bold] x",
        "--param", "scale=0.5", "--metadata", json.dumps({"k": 1}),
    )  # fmt: skip
    assert status == 0
    assert "failed" in screen  # the second, whose reward it is
    assert "[one two] {'k': 1}" in " ".join(screen.replace("│", " ").split())
    (line,) = [line for line in screen.splitlines() if line.startswith("│ reward")]
    assert [cell.strip() for cell in line.split("│")[2:4]] == ["3.5", "failed"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["colorfulness"], "give either image files to score, or a run"),
        (["colorfulness", "PICTURE", "--run", "r", "--prompt", "x"], "give either image files"),
        (["colorfulness", "PICTURE"], "1 images and 0 prompts"),
        (["colorfulness", "PICTURE", "--prompt", "x", "--prompt", "y"], "1 images and 2 prompts"),
        (["colorfulness", "PICTURE", "--prompt", " "], "must be text that is not blank"),
        (["colorfulness", "gone.png", "--prompt", "x"], "cannot read gone.png as an image"),
        (["colorfulness", "README.md", "--prompt", "x"], "cannot read README.md as an image"),
        (["colorfulness", "PICTURE", "--prompt", "x", "--metadata", "{"], "is not valid JSON"),
        (["colorfulness", "PICTURE", "--prompt", "x", "--metadata", "[]"], "is not a JSON object"),
        (["colourfulness", "PICTURE", "--prompt", "x"], "did you mean 'colorfulness'?"),
        (["colorfulness", "PICTURE", "--prompt", "x", "--param", "k=1"], "no parameter 'k'"),
        (["colorfulness", "PICTURE", "--prompt", "x", "--param", "k"], "expects NAME=VALUE"),
    ],
)
def test_bad_words_are_told_with_the_way_out(ddpo, pictures, words, told):
    status, screen = ddpo("score", *(pictures[0] if w == "PICTURE" else w for w in words))
    assert status == 2
    assert told in " ".join(screen.split())
    assert "Traceback" not in screen


def test_a_picture_that_claims_too_many_pixels_is_refused(ddpo, tmp_path):
    Image.new("1", (4097, 4097)).save(tmp_path / "huge.png")
    status, screen = ddpo("score", "colorfulness", tmp_path / "huge.png", "--prompt", "x")
    assert status == 2
    assert "at most 4096x4096 are allowed" in " ".join(screen.split())


def calibrate(ddpo, run: Run, *words: object) -> tuple[str, list]:
    status, screen = ddpo("score", *words, "--run", "drawn", "--root", run.store.root)
    assert status == 0, screen
    pasted = screen.partition("of `weighted`:\n")[2]
    return screen, yaml.safe_load(pasted)


def test_gray_of_16_bits_is_read_as_what_it_shows(tmp_path):
    eight = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(eight).save(tmp_path / "8.png")
    sixteen = eight.astype(np.uint16) << 8
    Image.fromarray(sixteen).save(tmp_path / "16.png")
    Image.fromarray(sixteen).save(tmp_path / "16.tif")
    for name in ("16.png", "16.tif"):
        assert np.array_equal(read_image(tmp_path / name), read_image(tmp_path / "8.png"))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(ddpo, tmp_path, dtype):
    Image.fromarray(np.zeros((8, 8), dtype)).save(tmp_path / "32.tif")
    status, screen = ddpo("score", "jpeg_compressibility", tmp_path / "32.tif", "--prompt", "x")
    assert status == 2
    assert "save it with 8 or 16 bits per channel" in screen


def test_a_runs_samples_give_the_constants_that_weighted_takes(ddpo, drawn):
    sizes = kilobytes(drawn, 0)
    assert len(sizes) == 4
    screen, (component,) = calibrate(ddpo, drawn, "jpeg_incompressibility")
    assert "4 samples of drawn, epoch 0" in screen
    assert component == {
        "name": "jpeg_incompressibility",
        "weight": 1.0,
        "mean": pytest.approx(sizes.mean(), rel=1e-5),
        "std": pytest.approx(sizes.std(), rel=1e-5),
    }
    summed = measure_range(load_reward("weighted", {"rewards": [component]}), drawn)
    assert summed.mean == pytest.approx(0, abs=1e-4)
    assert summed.std == pytest.approx(1, rel=1e-4)
    assert (summed.count, summed.failed, summed.epochs) == (4, 0, (0,))


def test_epochs_are_chosen_and_parameters_are_in_what_is_pasted(ddpo, drawn, own):
    screen, (component,) = calibrate(
        ddpo, drawn, f"{own}:words", "--param", "scale=0.25", "--epoch", 1, "--epoch", 0
    )
    assert "8 samples of drawn, epoch 0, 1" in screen
    assert component["name"] == f"{own}:words"
    assert component["parameters"] == {"scale": 0.25}
    load_reward("weighted", {"rewards": [component]})
    found = measure_range(load_reward("jpeg_incompressibility", {}), drawn, [1, 0])
    sizes = kilobytes(drawn, 0, 1)
    assert (found.low, found.high) == (sizes.min(), sizes.max())
    assert found.mean == pytest.approx(sizes.mean())


@pytest.mark.parametrize(
    ("reward", "words", "told"),
    [
        ("OWN:all_fail", [], "failed on all 4 samples"),
        ("jpeg_compressibility", ["--epoch", "7"], "no samples of epoch 7; it has epochs 0 to 1"),
        ("OWN:words", ["--param", "scale=0"], "gives every sample 0: there is no spread"),
    ],
)
def test_a_run_that_gives_no_constants_says_why(ddpo, drawn, own, reward, words, told):
    reward = reward.replace("OWN", own)
    status, screen = ddpo("score", reward, "--run", "drawn", "--root", drawn.store.root, *words)
    assert status == 2
    assert told in " ".join(screen.split())
