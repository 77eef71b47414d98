"""`optimizer.eight_bit`: AdamW's steps up to a rounding of moments, restored to the byte."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from ddpo.config import OptimizerConfig
from ddpo.errors import ConfigError, MissingPackage
from ddpo.memory.advice import check_fit
from ddpo.memory.estimate import estimate
from ddpo.models import Policy
from ddpo.models.numerics import Numerics, resolve_numerics
from ddpo.training.eight_bit import adamw_class, check_eight_bit
from ddpo.training.loop import initial_state, update
from ddpo.training.optimizer import copies, make_adamw, optimizer_state
from ddpo.training.state import TrainState
from tests.tiny import (
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    draw,
    load_policy,
    rollouts_of,
    tiny_config,
)

FOLDER = Path(sys.prefix) / "eight-bit"
SETTINGS = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, from the folder that `make install` puts it into."""
    assert FOLDER.is_dir(), "make install has not installed tests/eight_bit.txt"
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    adamw_class.cache_clear()


def weights() -> dict[str, torch.nn.Parameter]:
    """A weight of many numbers, in blocks that end unevenly, and one of few."""
    made = torch.Generator().manual_seed(0)
    shapes = {"many": (70, 101), "few": (8,)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=made)) for n, s in shapes.items()}


def stepped(eight_bit: bool, parameters: Mapping[str, torch.nn.Parameter], steps: range,
            state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    adamw = make_adamw(parameters, SETTINGS.changed(eight_bit=eight_bit), state)
    for step in steps:
        made = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            # As gradients are: some weights' are much larger than others'.
            scale = torch.logspace(-3, 0, parameter.numel()).view_as(parameter)
            parameter.grad = scale * torch.randn(parameter.shape, generator=made)
        adamw.step()
    return copies(optimizer_state(adamw, parameters))


def test_its_steps_are_those_of_adamw_up_to_what_8_bits_hold() -> None:
    start, plain, narrow = weights(), weights(), weights()
    stepped(False, plain, range(6), {})
    stepped(True, narrow, range(6), {})
    # Few numbers have moments in float32.
    torch.testing.assert_close(narrow["few"], plain["few"], rtol=1e-6, atol=1e-7)
    moved = (plain["many"] - start["many"]).norm()
    assert 0 < (narrow["many"] - plain["many"]).norm() < 0.05 * moved


def test_moments_take_a_quarter_and_a_scale_for_each_256() -> None:
    parameters = weights()
    state = stepped(True, parameters, range(1), {})
    numbers = parameters["many"].numel()
    assert {name: value.dtype for name, value in state.items() if name.endswith("many")} == {
        "step/many": torch.float32,
        "state1/many": torch.uint8,
        "state2/many": torch.uint8,
        "absmax1/many": torch.float32,
        "absmax2/many": torch.float32,
    }
    assert state["state1/many"].shape == parameters["many"].shape
    assert len(state["absmax1/many"]) == -(-numbers // 256)
    assert state["state1/few"].dtype == torch.float32


def test_restored_it_steps_on_in_the_same_bytes() -> None:
    straight, resumed = weights(), weights()
    whole = stepped(True, straight, range(5), {})
    half = stepped(True, resumed, range(2), {})
    rest = stepped(True, resumed, range(2, 5), half)
    assert_same_tensors(rest, whole)
    assert_same_tensors(resumed, straight)


def test_an_epoch_after_a_checkpoint_has_the_same_bytes(tiny_model: Path) -> None:
    config = tiny_config(
        tiny_model, trainable={"type": "full"}, optimizer={"eight_bit": True, "ema_decay": 0.9}
    )

    def epoch(policy: Policy, state: TrainState) -> TrainState:
        policy.weights.load(state.weights)
        drawn = rollouts_of(draw(policy, config))
        credit = as_credit(alternating_advantages(len(drawn.latents)))
        return update(policy, state, drawn, credit, {}, config)[0]

    policy = load_policy(config)
    first = epoch(policy, initial_state(policy, ema=True))
    assert {value.dtype for value in first.optimizer.values()} == {torch.float32, torch.uint8}
    straight = epoch(policy, first)
    resumed = epoch(load_policy(config), first)
    assert_same_tensors(resumed.weights, straight.weights)
    assert_same_tensors(resumed.optimizer, straight.optimizer)


def test_the_estimate_counts_moments_in_8_bits(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, trainable={"type": "full"})
    numerics = resolve_numerics(config.numerics)
    on_a_gpu = Numerics.model_validate({**dict(numerics), "device": "cuda"})
    plain, narrow = (
        estimate(
            config.changed(optimizer=config.optimizer.changed(eight_bit=eight_bit)),
            on_a_gpu,
            parts=("update",),
        ).peaks["update"]
        for eight_bit in (False, True)
    )
    sizes = [each.numel() for each in load_policy(config).weights.parameters().values()]
    numbers = sum(size for size in sizes if size >= 4096)
    assert plain - narrow == pytest.approx(numbers * (8 - 2 - 8 / 256), rel=0.2)


def test_without_the_package_its_name_and_extra_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    adamw_class.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingPackage, match=r"eight_bit needs .* bitsandbytes.*eight-bit"):
        make_adamw(weights(), SETTINGS.changed(eight_bit=True), {})


def test_a_device_that_it_cannot_step_on_is_told_before_the_run() -> None:
    check_eight_bit("cpu")
    failing = patch.object(adamw_class(), "update_step", side_effect=RuntimeError("no kernel\nat"))
    with failing, pytest.raises(ConfigError, match=r"cannot step on 'cpu' here \(no kernel\)"):
        check_eight_bit("cpu")


def test_doctor_offers_it_before_an_adapter(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, trainable={"type": "full"})
    smallest = {"gradient_checkpointing": True, "offload_activations": True}
    numerics = Numerics.model_validate(
        {**dict(resolve_numerics(config.numerics)), "device": "cuda", **smallest}
    )
    fixed = 3 * sum(p.numel() * 4 for p in load_policy(config).weights.parameters().values())
    assert "optimizer.eight_bit" in check_fit(config, numerics, fixed).settings


def test_processes_that_split_moments_refuse_it(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, trainable={"type": "full"}, engine={"type": "processes"})
    with pytest.raises(ValueError, match=r"eight_bit: engine\.type processes splits"):
        config.changed(optimizer=config.optimizer.changed(eight_bit=True))
