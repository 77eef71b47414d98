"""Whole-network training from random weights: the network alone, and the same by the run's seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from ddpo.basics.randomness import derive_seed
from ddpo.models import Policy
from tests.models.test_families import family_config, tiny_families  # noqa: F401  # a fixture
from tests.tiny import assert_same_tensors, load_policy, tiny_config
from tests.tiny_families import FAMILIES

SCRATCH = {"type": "full", "from_scratch": True}


def scratch(model: Path, **changes: object) -> Policy:
    return load_policy(tiny_config(model, trainable=SCRATCH, **changes))


def test_the_network_is_what_its_class_begins_with_under_the_runs_seed(tiny_model: Path) -> None:
    found = scratch(tiny_model, seed=3).weights.state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(3, "network"))
        fresh = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(tiny_model / "unet")
        )
    assert_same_tensors(found, fresh.state_dict())


def test_it_comes_from_the_seed_and_leaves_the_global_generator_alone(tiny_model: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = scratch(tiny_model)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert scratch(tiny_model).digest == first.digest
    assert scratch(tiny_model, seed=1).digest != first.digest
    base = load_policy(tiny_config(tiny_model, trainable={"type": "full"}))
    assert first.base_digest == base.base_digest and first.digest != base.digest


@pytest.mark.parametrize("name", FAMILIES)
def test_every_other_part_is_the_models_and_every_weight_is_trained(
    tiny_families: Mapping[str, Path],  # noqa: F811
    name: str,
) -> None:
    policy, base = (
        load_policy(family_config(tiny_families, name, trainable=kind))
        for kind in (SCRATCH, {"type": "full"})
    )
    network = type(policy).network_part
    other = base.pipeline.components
    compared = 0
    for part, module in policy.pipeline.components.items():
        if part != network and isinstance(module, nn.Module):
            assert_same_tensors(module.state_dict(), other[part].state_dict())
            compared += 1
    assert compared >= 2  # the autoencoder, and what reads the prompt
    own, theirs = policy.weights.state(), base.weights.state()
    matrices = [key for key, value in own.items() if value.ndim > 1 and value.std() > 0]
    assert len(matrices) > 10
    trained = policy.weights.parameters()
    assert {key for key, _ in policy.network.named_parameters()} == trained.keys()
    assert not [key for key in matrices if key in trained and torch.equal(own[key], theirs[key])]


def test_the_export_is_the_pipeline_with_the_random_network(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy = scratch(tiny_model)
    policy.export(tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert_same_tensors(plain.unet.state_dict(), policy.weights.state())
    assert_same_tensors(plain.vae.state_dict(), policy.pipeline.vae.state_dict())
