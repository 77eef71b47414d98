"""Adapters on the text encoders, by option: trained, kept, and exported like the UNet's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpo.config import RunConfig
from ddpo.diffusion.divergence import kl_to_base
from ddpo.diffusion.sampling import sample
from ddpo.errors import ConfigError
from ddpo.training.loop import initial_state, update
from tests.models.test_families import _PLAIN_DIFFUSERS
from tests.tiny import (
    alternating_advantages,
    as_credit,
    build_tiny_model,
    draw,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)
from tests.tiny_families import SETTINGS, build_tiny_sd3, build_tiny_sdxl

PARTS = {"sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "sd": build_tiny_model(folder / "sd"),
        "sdxl": build_tiny_sdxl(folder / "sdxl"),
    }


def config_of(models: Mapping[str, Path], name: str, **changes: Any) -> RunConfig:
    own = {**SETTINGS.get(name, {}), "trainable": {"type": "lora", "text_encoders": True}}
    return tiny_config(models[name], **{**own, **changes})


@pytest.mark.parametrize("name", PARTS)
def test_an_update_trains_them_and_the_initial_ratio_is_exactly_1(
    models: Mapping[str, Path], name: str
) -> None:
    config = config_of(
        models, name, algorithm={"type": "ddpo_is", "updates_per_epoch": 1, "kl_weight": 0.1}
    )
    policy = load_policy(config)
    drawn = draw(policy, config)
    before = {key: value.clone() for key, value in policy.weights.state().items()}
    credit = as_credit(alternating_advantages(8))
    after, metrics = update(policy, initial_state(policy), rollouts_of(drawn), credit, {}, config)
    assert metrics["initial_ratio_deviation"]["max"] == 0.0
    for part in PARTS[name]:
        own = [key for key in before if key.startswith(f"{part}.text_model.encoder.")]
        assert len(own) == 2 * 4 * 2, own  # two layers, four matrices each, A and B
        # Of the last layer, SDXL reads nothing but the second encoder's pooled text.
        grown = [key for key in own if ".lora_B." in key and ".layers.0." in key]
        assert len(grown) == 4
        assert all(after.weights[key].any() and not before[key].any() for key in grown)
    assert torch.isfinite(torch.tensor(metrics["loss"]))


@pytest.mark.parametrize("name", PARTS)
def test_gradients_are_those_of_finite_differences(models: Mapping[str, Path], name: str) -> None:
    policy = load_policy(config_of(models, name))
    grow_adapter(policy)
    part = PARTS[name][-1]
    key = next(
        key for key in policy.weights.parameters() if key.startswith(f"{part}.") and "_B" in key
    )
    parameter = policy.weights.parameters()[key]
    shape = (1, *policy.latent_shape)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def total() -> torch.Tensor:
        rows = policy.encode(["a cat"])
        return policy.predict(latents, torch.tensor([100.0]), rows, 3.0).double().square().sum()

    total().backward()
    assert parameter.grad is not None
    direction = parameter.grad / parameter.grad.norm()
    step = 1e-2
    with torch.no_grad():
        parameter += step * direction
        above = total()
        parameter -= 2 * step * direction
        below = total()
    expected = float(parameter.grad.norm())
    assert float(above - below) / (2 * step) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", PARTS)
def test_sets_of_weights_encode_by_themselves(models: Mapping[str, Path], name: str) -> None:
    policy = load_policy(config_of(models, name))
    base = policy.encode(["a cat"])["text"].detach()
    state = {key: value.clone() for key, value in policy.weights.state().items()}
    grow_adapter(policy)
    grown = policy.encode(["a cat"])["text"].detach()
    assert not torch.equal(base, grown)
    with policy.weights.use("base"):
        assert torch.equal(policy.encode(["a cat"])["text"], base)
    policy.weights.keep("average", state)
    with policy.weights.use("average"):
        assert torch.equal(policy.encode(["a cat"])["text"], base)
    assert torch.equal(policy.encode(["a cat"])["text"], grown)
    sampler = config_of(models, name).sampler
    with torch.no_grad():  # what is left of the divergence is the text encoders'
        for key, parameter in policy.weights.parameters().items():
            if not key.startswith("text_encoder"):
                parameter.zero_()
    kl = kl_to_base(policy, ["a cat"], [1], sampler)
    assert float(kl.nan_to_num().max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_plain_diffusers_draws_the_same_pictures(
    models: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    trainable = {"type": "lora", "alpha": 8.0, "text_encoders": True}
    config = config_of(models, name, trainable=trainable)
    policy = load_policy(config)
    grow_adapter(policy)
    still = config.sampler.at_inference(0.0)
    ours = [np.asarray(sample(policy, ["a cat"], [seed], still).images[0]) for seed in range(2)]
    policy.export(tmp_path / "lora")
    policy.export_lora(tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors", {})
    arguments = {**still.pipeline_arguments, **policy.pipeline_arguments}
    program = [sys.executable, "-c", _PLAIN_DIFFUSERS]
    given = map(str, (models[name], tmp_path / "lora", tmp_path, arguments))
    subprocess.run([*program, *given], check=True, cwd=tmp_path, timeout=900)
    for seed in range(2):
        theirs = np.asarray(Image.open(tmp_path / f"{seed}.png"))
        assert np.array_equal(theirs, ours[seed])
    called = {"sd": ["lora_te_"], "sdxl": ["lora_te1_", "lora_te2_"]}[name]
    kohya = load_file(tmp_path / "kohya.safetensors")
    exported = load_file(tmp_path / "diffusers.safetensors")
    for prefix, part in zip(called, PARTS[name], strict=True):
        layer = "text_model.encoder.layers.0.self_attn.q_proj"
        down = kohya[f"{prefix}{layer.replace('.', '_')}.lora_down.weight"]
        assert torch.equal(down, exported[f"{part}.{layer}.lora_A.weight"])


def test_families_that_cannot_train_them_say_so(tmp_path: Path) -> None:
    models = {"sd3": build_tiny_sd3(tmp_path / "sd3")}
    with pytest.raises(ConfigError, match="text_encoders: those of a StableDiffusion3 cannot"):
        load_policy(config_of(models, "sd3"))
