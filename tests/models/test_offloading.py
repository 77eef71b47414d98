"""`numerics.offload_activations`: the gradient stays, and the device holds less."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpo.config import RunConfig
from ddpo.errors import ConfigError
from ddpo.memory.advice import check_fit
from ddpo.memory.estimate import estimate
from ddpo.models import Policy, load_policy
from ddpo.models import offloading as module
from ddpo.models.numerics import Numerics, resolve_elsewhere, resolve_numerics
from ddpo.training.loop import initial_state, update
from tests.tiny import (
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    build_tiny_model,
    draw,
    grow_adapter,
    rollouts_of,
    tiny_config,
)
from tests.tiny_families import FAMILIES, SETTINGS

ALL = {"sd": build_tiny_model, **FAMILIES}


def numerics_of(config: RunConfig, **changes: Any) -> Numerics:
    """Return a config's numerics with what this machine would refuse."""
    return Numerics.model_validate({**dict(resolve_numerics(config.numerics)), **changes})


def grown(config: RunConfig, **changes: Any) -> Policy:
    policy = load_policy(
        config.model, config.trainable, numerics_of(config, **changes), seed=config.seed
    )
    grow_adapter(policy)
    return policy


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What forwards save: whether it stays on the device."""
    hooks = module.saved_tensors_hooks
    stays: list[bool] = []

    def watched(pack: Any, unpack: Any) -> Any:
        def watching(tensor: torch.Tensor) -> Any:
            back = pack(tensor)
            stays.append(back() is tensor)
            return back

        return hooks(watching, unpack)

    monkeypatch.setattr(module, "saved_tensors_hooks", watched)
    return stays


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ALL)
def test_no_bit_of_the_gradient_changes(
    tmp_path: Path, packed: list[bool], family: str, checkpointing: bool
) -> None:
    """On a CPU the copies are made as well, from and to the same memory."""
    folder = ALL[family](tmp_path / family)
    config = tiny_config(folder, **SETTINGS.get(family, {}))
    found = []
    for offloads in (False, True):
        policy = grown(config, offload_activations=offloads, gradient_checkpointing=checkpointing)
        drawn = rollouts_of(draw(policy, config))
        assert not packed  # neither in sampling
        credit = as_credit(alternating_advantages(len(drawn.latents)))
        found.append(update(policy, initial_state(policy), drawn, credit, {}, config)[0].weights)
    assert_same_tensors(found[1], found[0])
    assert False in packed


def test_weights_stay_and_all_else_leaves(tiny_model: Path, packed: list[bool]) -> None:
    policy = grown(tiny_config(tiny_model), offload_activations=True)
    latents = torch.randn(2, *policy.latent_shape)
    times = torch.full((2,), 500)
    policy.predict(latents, times, policy.encode(["a cat", "a dog"]), 3.0).sum().backward()
    # Frozen weights that a gradient passes through are saved, for one.
    frozen = sum(not each.requires_grad for each in policy.network.parameters())
    assert frozen / 2 < packed.count(True) and packed.count(False) > 50


def test_a_weight_that_changes_before_the_backward_is_told(tiny_model: Path) -> None:
    policy = grown(tiny_config(tiny_model), offload_activations=True)
    latents = torch.randn(2, *policy.latent_shape)
    output = policy.predict(latents, torch.full((2,), 500), policy.encode(["a", "b"]), 1.0)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place between a forward and its backward"):
        output.sum().backward()


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_the_estimate_of_an_update_shrinks(tmp_path: Path, family: str) -> None:
    config = tiny_config(ALL[family](tmp_path / family), **SETTINGS.get(family, {}))
    plain, offloaded = (
        estimate(
            config,
            numerics_of(config, device="cuda", offload_activations=offloads),
            parts=("update",),
        ).peaks["update"]
        for offloads in (False, True)
    )
    assert offloaded < 0.8 * plain


def test_doctor_offers_it_before_another_run(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, numerics={"micro_batch_size": 1, "sample_batch_size": 1})
    smallest = {"gradient_checkpointing": True, "dtype": "bfloat16", "device": "cuda"}
    offers = {}
    for name, more in {"gpu": {}, "compiled": {"compile": True}}.items():
        fit = check_fit(config, numerics_of(config, **smallest, **more), 1)
        offers[name] = dict(fit.settings)
    assert offers == {"gpu": {"numerics.offload_activations": True}, "compiled": {}}


def test_a_device_without_memory_of_its_own_is_refused(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, numerics={"offload_activations": True})
    with pytest.raises(ConfigError, match=r"offload_activations.*on 'cpu' they are already"):
        resolve_numerics(config.numerics)


def test_a_run_that_offloads_is_read_on_a_cpu(tiny_model: Path) -> None:
    there = numerics_of(tiny_config(tiny_model), device="cuda", offload_activations=True)
    assert not resolve_elsewhere(there, "cpu").offload_activations


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"numerics": {"compile": True}}, "compiled blocks"),
        ({"trainable": {"type": "full"}, "engine": {"type": "processes"}}, "processes split"),
        ({"numerics": {"micro_batch_size": "auto"}}, "set a number"),
    ],
    ids=["compiled", "split", "auto"],
)
def test_what_does_not_go_with_it_is_refused(
    tiny_model: Path, changes: Mapping[str, Any], named: str
) -> None:
    config = tiny_config(tiny_model, **changes)
    numerics = {**config.numerics.model_dump(), "offload_activations": True}
    with pytest.raises(ValueError, match=f"offload_activations: .*{named}"):
        config.changed(numerics=numerics)
