"""What torch or diffusers would refuse in the middle of a run is refused before it starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpo.analysis.sample_image import draw
from ddpo.config import LoraConfig, ModelConfig
from ddpo.errors import ConfigError
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_elsewhere, resolve_numerics
from ddpo_workflow.flows.cli import app as cli
from tests.recorded import record_run
from tests.tiny import tiny_config

STARTER = "configs/starter.yaml"
Ddpo = Callable[..., tuple[int, str]]


@pytest.fixture
def ddpo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Ddpo:
    monkeypatch.setenv("DDPO_ROOT", str(tmp_path / "store"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ddpo.models.pipeline_policy.PipelinePolicy._loaded", refuse)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), " ".join(
            (shown.out + shown.err).replace("│", "").split()
        )

    return run


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["optimizer.betas=[1.5, 0.9]"], "optimizer.betas.0: found 1.5; input should be less"),
        (["optimizer.betas=[0.9, 1]"], "optimizer.betas.1: found 1; input should be less than 1"),
        (["optimizer.betas=[-0.1, 0.9]"], "optimizer.betas.0: found -0.1; input should be greater"),
        (["optimizer.learning_rate=1e7"], "optimizer.learning_rate: found 10000000.0; input"),
        (["optimizer.weight_decay=1e7"], "optimizer.weight_decay: found 10000000.0; input should"),
        (["optimizer.epsilon=1e-50"], "optimizer.epsilon: 1e-50 does not fit into float32"),
        (["numerics.threads=100000"], "numerics.threads: found 100000; input should be less than"),
        (["numerics.micro_batch_size=100000000000000000000"], "more than 64 bits"),
        (["epochs=100000"], "epochs: found 100000; input should be less than 100000"),
        (["tracking.pictures.seeds=[-1]"], "tracking.pictures.seeds.0: found -1; input should be"),
        (["tracking.pictures.seeds=[9223372036854775808]"], "input should be less than"),
        (["rollouts.samples_per_epoch=2000000"], "rollouts.samples_per_epoch: found 2000000"),
        (
            [
                "rollouts={samples_per_epoch: 200000, shard_size: 1}",
                "numerics.sample_batch_size=1",
            ],
            "rollouts.shard_size 1 makes 200000 shards per epoch; set it to at least 2",
        ),
        (["sampler.steps=1001"], "sampler.steps is 1001, more than the model's 1000 training"),
        (["sampler.steps=1000000000000"], "more than the model's 1000 training timesteps allow"),
        (["trainable={type: lora, target_modules: []}"], "trainable.target_modules: found []"),
        (
            ["trainable={type: lora, rank: 0}"],
            "trainable.rank: found 0; input should be greater than 0",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_setting_out_of_range_is_told_before_anything_starts(
    ddpo: Ddpo, tmp_path: Path, settings: list[str], told: str
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    status, screen = ddpo("train", STARTER, *words)
    assert status == 2
    assert told in screen
    assert "Traceback" not in screen
    assert not list((tmp_path / "store").rglob("run.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_model_is_loaded_for_a_device_that_is_absent(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    config = tiny_config(tiny_model)
    cuda = resolve_numerics(config.numerics).model_copy(update={"device": "cuda"})
    monkeypatch.setattr("ddpo.models.family_of", lambda model: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match="torch finds no CUDA device here"):
        load_policy(ModelConfig(path=str(tiny_model)), LoraConfig(), cuda, seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_run_of_another_machine_is_sampled_on_a_device_of_this_one(tiny_model: Path) -> None:
    run = record_run(tiny_model, "memory://elsewhere")
    numerics = run.numerics.model_copy(
        update={"device": "cuda", "device_name": "H100", "dtype": "bfloat16"}
    )
    elsewhere = replace(run, numerics=numerics)
    with pytest.raises(ConfigError, match=r"trained on 'cuda'.*such as --device cpu"):
        draw(elsewhere, "a cat", seed=3)
    with pytest.raises(ConfigError, match="--device is 'cuda', but torch finds no CUDA device"):
        draw(elsewhere, "a cat", seed=3, device="cuda")
    here = resolve_elsewhere(numerics, "cpu")
    assert (here.device, here.dtype) == ("cpu", "float32")
    drawn = draw(elsewhere, "a cat", seed=3, device="cpu")
    assert drawn.tobytes() == draw(run, "a cat", seed=3).tobytes()


def test_a_run_keeps_its_numerics_on_its_own_device(tiny_model: Path) -> None:
    numerics = resolve_numerics(tiny_config(tiny_model).numerics)
    for device in (None, "cpu"):
        assert resolve_elsewhere(numerics, device) == numerics


def test_a_device_that_there_is_not_is_refused(ddpo: Ddpo) -> None:
    status, screen = ddpo(
        "sample", "mine", "--prompt", "a cat", "--out", "x.png", "--device", "tpu"
    )
    assert status == 2
    assert "'tpu' is not one of 'auto', 'cpu', 'cuda', 'mps'" in screen
