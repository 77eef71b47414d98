"""Promises of the training command: all stages run, and a kill changes nothing."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ddpo.diffusion.sampling import sample
from ddpo.models import check_model
from ddpo.starter.render import draw
from ddpo.starter.scenes import SCENES
from starter_training import loop, measure
from starter_training.export import export_flow
from starter_training.loop import Budget, learning_rate
from starter_training.losses import kl_loss, picture_loss
from starter_training.networks import build_vae, whiten
from starter_training.stages.pictures import draw_pictures, judge_seed, read_pictures, scene_numbers
from starter_training.train import PLAN, app, run_stages, show_plan, train
from starter_training.work import FlowRecipe, Recipe, WorkFolder, WorkFolderError, source_commit
from tests.sweeps import swept
from tests.tiny import load_policy, tiny_config

TINY = Recipe(
    seed=1,
    cached_pictures=8,
    vae=Budget(pictures=8, batch=2, lr=1e-3),
    judge=Budget(pictures=8, batch=2, lr=1e-3),
    unet=Budget(pictures=8, batch=2, lr=1e-3),
)


class KilledError(BaseException):
    """Stands for a kill."""


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """All files but the journal of seconds, which no two runs share."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("journal.json", "training.json")
    }


def small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop, "CHECKPOINT_EVERY", 2)
    patch.setattr(measure, "FRESH_PICTURES", 64)
    patch.setattr("starter_training.report.SHOWN", 2)


def run(folder: Path, resume: bool) -> None:
    train(WorkFolder(folder / "work"), TINY, folder / "out", folder / "judge", resume)


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        run(folder, resume=False)
    return folder


def killed_at_save(number: int, before: bool) -> Callable[..., None]:
    """Returns a `save_file` that ends in a kill the n-th time: before the file, or half way."""
    calls = 0

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == number and before:
            raise KilledError
        save_file(tensors, path)
        if calls == number:
            path.write_bytes(path.read_bytes()[:100])
            raise KilledError

    return save


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "module", "before"),
    swept(
        [
            (2, "loop", True),  # the autoencoder's last save
            (4, "loop", False),  # within the judge's last
            (1, "stages.autoencoder", False),  # within that of the latents
            (5, "loop", False),  # within the generator's first
            (6, "loop", True),  # the generator's last
        ],
        often=lambda number, *_: number == 5,
    ),
)
def test_killed_and_resumed_ends_in_the_same_bytes(
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    module: str,
    before: bool,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"starter_training.{module}.save_file", killed_at_save(number, before=before))
        with pytest.raises(KilledError):
            run(tmp_path, resume=False)
    assert not (tmp_path / "out").exists()
    run(tmp_path, resume=True)
    assert folder_bytes(tmp_path) == folder_bytes(straight)


@pytest.mark.slow
def test_a_kill_between_the_two_sets_of_pictures_changes_nothing(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("starter_training.stages.pictures.judge_seed", raise_killed)
        with pytest.raises(KilledError):
            draw_pictures(work, TINY)
    assert work.pictures.exists() and not work.judge_pictures.exists()
    draw_pictures(work, TINY)
    for path in (work.pictures, work.judge_pictures):
        assert path.read_bytes() == (straight / "work" / path.name).read_bytes()


def raise_killed(*_: object) -> int:
    raise KilledError


@pytest.mark.slow
def test_labels_belong_to_their_pictures_and_no_held_out_pair_is_learnt(straight: Path) -> None:
    work = WorkFolder(straight / "work")
    sets = (
        (work.pictures, TINY.seed, False),
        (work.judge_pictures, judge_seed(TINY), True),
    )
    for path, seed, all_pairs in sets:
        numbers = scene_numbers(seed, 8, all_pairs=all_pairs)
        for index, pixels in enumerate(read_pictures(path)):
            picture = draw(seed, index, all_pairs=all_pairs)
            assert (picture.pixels == pixels).all()
            assert picture.scene == SCENES[numbers[index]]
    assert not any(SCENES[number].held_out for number in scene_numbers(TINY.seed, 2000))
    assert any(
        SCENES[number].held_out for number in scene_numbers(judge_seed(TINY), 2000, all_pairs=True)
    )


@pytest.mark.slow
def test_the_weights_name_what_made_them(straight: Path) -> None:
    for folder in ("out", "judge"):
        record = json.loads((straight / folder / "training.json").read_text())
        assert record["command"] == (
            "python -m starter_training.train --seed 1 --cached-pictures 8 --vae-pictures 8 "
            "--judge-pictures 8 --unet-pictures 8"
        )
        assert record["recipe"]["seed"] == 1
        assert list(record["stages"]) == sorted(stage.name for stage in PLAN)
        assert all(stage["done"] for stage in record["stages"].values())
        assert all(len(stage["commits"]) == 1 for stage in record["stages"].values())
        assert record["unet_pictures_seen"] == 8
        assert set(record["figures"]["judge"]) == {"renders", "reconstructions"}


@pytest.mark.slow
def test_the_report_shows_curves_and_pictures(straight: Path) -> None:
    report = straight / "work" / "report"
    names = {"curves", "reconstructions", "single", "activity", "count", "other"}
    assert {path.stem for path in report.iterdir()} == names
    for path in report.iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) >= 64 and np.asarray(picture.convert("L")).std() > 1, path


@pytest.mark.slow
def test_the_plan_tells_what_is_left(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(TINY, unet=Budget(600_000, 2, lr=1e-3))
    begun = WorkFolder(straight / "work")
    left = {stage.name: stage.left(begun, recipe) for stage in PLAN}
    assert left["autoencoder"] == left["judge"] == 0
    assert left["generator"] == 600_000 - 8
    assert PLAN[-1].left(WorkFolder(tmp_path), recipe) == 600_000
    show_plan(recipe, left)
    shown = capsys.readouterr().out
    assert shown.count("done") == 2
    assert "599,992" in shown and "About 67 minutes left" in shown


def test_the_journal_keeps_commits_and_seconds_of_all_parts(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    with pytest.raises(KilledError), work.noting("judge", "one"):
        raise KilledError
    assert work.finished() == set()
    for commit in ("one", "two"):
        with work.noting("judge", commit):
            pass
    assert work.finished() == {"judge"}
    assert work.read_journal()["judge"]["commits"] == ["one", "two"]


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_the_source_commit_tells_changed_code_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ddpo" / "starter"
    package.mkdir(parents=True)
    monkeypatch.setattr("starter_training.work.__file__", str(package / "work.py"))
    assert source_commit() == "unknown"
    (package / "render.py").write_text("1")
    (package / "README.md").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = source_commit()
    assert len(clean) == 40
    (package / "README.md").write_text("2")
    assert source_commit() == clean
    (package / "new.py").write_text("2")
    assert source_commit() == clean + "+"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--export"], "contains no run"),
        (["--vae-pictures", "8"], "batch of 16"),
    ],
)
def test_expected_mistakes_are_one_message(tmp_path: Path, words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["--work", str(tmp_path / "work"), *words])
    assert done.exit_code == 2
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert said in " ".join(done.output.split())  # a long path wraps the line


@pytest.mark.slow
def test_a_flow_matching_starter_is_trained_and_resumed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = FlowRecipe(seed=1, cached_pictures=8, flow=Budget(pictures=8, batch=2, lr=1e-3))
    for name in ("straight", "killed"):
        work = WorkFolder(tmp_path / name)
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(loop, "save_file", killed_at_save(2, before=False))
                with pytest.raises(KilledError):
                    run_stages(work, recipe, resume=False)
        run_stages(work, recipe, resume=name == "killed")
        export_flow(work, recipe, tmp_path / f"{name}-out")
    straight, killed = (folder_bytes(tmp_path / f"{name}-out") for name in ("straight", "killed"))
    assert straight == killed
    out = tmp_path / "straight-out"
    config = tiny_config(
        out,
        model={"text_tokens": 0},
        sampler={"type": "flow_sde", "steps": 2, "guidance_scale": 2.0},
    )
    assert check_model(config.model).latent_shape == (16, 8, 8)
    policy = load_policy(config)
    (ours,) = sample(policy, ["a cat"], [3], config.sampler.at_inference(0.0)).images
    plain = StableDiffusion3Pipeline.from_pretrained(out, text_encoder_3=None, tokenizer_3=None)
    (theirs,) = plain(
        "a cat",
        num_inference_steps=2,
        guidance_scale=2.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(3),
    ).images
    assert ours.size == (64, 64)
    difference = np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)
    assert np.abs(difference).max() <= 1  # weights that lie elsewhere in memory round otherwise


@pytest.mark.slow
def test_what_comes_out_is_a_pipeline_that_drew_from_a_trained_average(straight: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(straight / "out")
    checkpoint = load_file(straight / "work" / "unet.safetensors")
    name = "conv_in.weight"
    ema = checkpoint[f"ema/unet.{name}"]
    assert torch.equal(pipeline.unet.state_dict()[name], ema.half().float())
    assert not torch.equal(ema, checkpoint[f"model/unet.{name}"])


@pytest.mark.slow
def test_latents_are_whitened_and_the_autoencoder_with_them(straight: Path) -> None:
    latents = load_file(straight / "work" / "latents.safetensors")["latents"].float()
    assert latents.mean((0, 2, 3)).abs().max() < 1e-2
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_whitening_leaves_pictures_as_they_are() -> None:
    torch.manual_seed(0)
    vae, pictures = build_vae().double().eval(), torch.rand(2, 3, 64, 64).double()
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        made = vae.decode(before.mean).sample
        mean, std = torch.randn(16).double(), torch.rand(16).double() + 0.5
        whiten(vae, mean, std)
        after = vae.encode(pictures).latent_dist
        torch.testing.assert_close(
            after.mean, (before.mean - mean[:, None, None]) / std[:, None, None]
        )
        torch.testing.assert_close(after.std, before.std / std[:, None, None])
        torch.testing.assert_close(vae.decode(after.mean).sample, made)


def test_a_folder_with_a_run_is_not_taken_by_accident(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "work")
    work.claim(TINY, resume=False)
    assert work.read_recipe() == TINY
    work.claim(TINY, resume=True)
    with pytest.raises(WorkFolderError, match="--resume"):
        work.claim(TINY, resume=False)
    with pytest.raises(WorkFolderError, match=r"'seed': \(1, 2\)"):
        work.claim(replace(TINY, seed=2), resume=True)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    budget = Budget(pictures=1000, batch=2, lr=1.0)
    rates = [learning_rate(budget, step) for step in range(budget.steps)]
    assert rates[0] < 0.1 and max(rates) > 0.99 and rates[-1] < 1e-4
    assert rates.index(max(rates)) == pytest.approx(0.04 * budget.steps, abs=1)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        Budget(pictures=9, batch=3, lr=1.0)


def test_a_blur_and_a_grey_both_cost_more_than_the_picture_itself() -> None:
    torch.manual_seed(0)
    real = torch.rand(1, 3, 64, 64) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(real, 5, 1, 2)
    assert picture_loss(real, real) == 0
    assert picture_loss(blurred, real) > 0.1
    assert kl_loss(torch.zeros(2), torch.zeros(2)) == 0
