"""float16 on the CPU, with gradients that overflow on purpose."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpo.config import RunConfig
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo.training.loop import initial_state, update
from ddpo.training.loss_scale import LossScale
from ddpo.training.samples import Rollouts
from ddpo.training.state import TrainState
from tests.states import commit_state
from tests.tiny import (
    Credit,
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    draw,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)

ALGORITHMS: dict[str, dict[str, Any]] = {
    "ddpo_is": {"type": "ddpo_is", "updates_per_epoch": 2},
    "rwr": {"type": "rwr", "inner_epochs": 1, "updates_per_epoch": 2},
}
BACKWARDS = {"ddpo_is": 4, "rwr": 1}
"""Of one update: four samples, in micro-batches of four, and four steps if they are trained."""


def half_run(
    folder: Path, kind: str = "ddpo_is", dtype: str = "float16"
) -> tuple[Policy, RunConfig]:
    config = tiny_config(
        folder,
        numerics={"dtype": dtype},
        algorithm=ALGORITHMS[kind],
        optimizer={"learning_rate": 1e-3, "ema_decay": 0.5},
    )
    policy = load_policy(config)
    grow_adapter(policy)
    return policy, config


def credit_of(kind: str) -> Credit:
    if kind == "rwr":
        return {"reward": torch.zeros(8), "weight": torch.linspace(0.5, 2, 8)}
    return as_credit(alternating_advantages(8))


def samples_of(policy: Policy, config: RunConfig, epoch: int = 0) -> Rollouts:
    return rollouts_of(draw(policy, config, first_seed=1000 * (epoch + 1)))


@contextmanager
def overflowing(policy: Policy, backwards: range) -> Iterator[None]:
    """Let one parameter's gradient overflow in the backwards of these numbers."""
    calls = 0

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient + torch.inf if calls - 1 in backwards else gradient

    handle = next(iter(policy.weights.parameters().values())).register_hook(overflow)
    yield
    handle.remove()


def run_update(
    policy: Policy, state: TrainState, config: RunConfig, kind: str = "ddpo_is", epoch: int = 0
) -> tuple[TrainState, dict[str, Any]]:
    drawn = samples_of(policy, config, epoch)
    return update(policy, state, drawn, credit_of(kind), {}, config)


@pytest.mark.parametrize("kind", ["ddpo_is", "rwr"])
def test_an_overflow_skips_its_step_and_the_scale_backs_off(tiny_model: Path, kind: str) -> None:
    policy, config = half_run(tiny_model, kind)
    before = initial_state(policy, ema=True)
    assert before.loss_scale is None
    with overflowing(policy, range(BACKWARDS[kind])):  # the first update's
        after, metrics = run_update(policy, before, config, kind)
    assert metrics["skipped_steps"] == 1 and metrics["loss_scale"] == 512.0
    assert after.loss_scale == LossScale(512.0, good_steps=1)
    assert after.updates == 1 and metrics["grad_norm"] > 0
    steps = {float(v) for name, v in after.optimizer.items() if name.startswith("step/")}
    assert steps == {1.0}
    for name, weights in after.weights.items():
        assert weights.isfinite().all()
        # One step, which the average followed once.
        expected = 0.5 * (before.weights[name] + weights)
        torch.testing.assert_close(after.ema[name], expected)


def test_an_epoch_of_overflows_leaves_the_weights_and_the_next_one_trains(
    tiny_model: Path,
) -> None:
    policy, config = half_run(tiny_model)
    before = initial_state(policy, ema=True)
    with overflowing(policy, range(8)):
        skipped, metrics = run_update(policy, before, config)
    assert metrics["skipped_steps"] == 2 and metrics["grad_norm"] is None
    assert_same_tensors(skipped.weights, before.weights)
    assert skipped.loss_scale == LossScale(256.0) and skipped.updates == 0
    after, metrics = run_update(policy, skipped, config, epoch=1)
    assert metrics["skipped_steps"] == 0 and metrics["loss_scale"] == 256.0 and after.updates == 2


def test_a_gradient_that_overflows_at_the_least_scale_stops_the_run(tiny_model: Path) -> None:
    policy, config = half_run(tiny_model)
    before = replace(initial_state(policy, ema=True), loss_scale=LossScale(2.0))
    message = r"the gradient's norm is inf.*numerics\.dtype bfloat16 or float32"
    with overflowing(policy, range(8)), pytest.raises(NonFiniteError, match=message):
        run_update(policy, before, config)
    assert_same_tensors(policy.weights.state(), before.weights)


@pytest.mark.slow
def test_a_run_resumes_with_the_scale_that_it_had(tiny_model: Path) -> None:
    policy, config = half_run(tiny_model)
    with overflowing(policy, range(4)):
        first, _ = run_update(policy, initial_state(policy, ema=True), config)
    straight, metrics = run_update(policy, first, config, epoch=1)

    store = Store.open(f"memory://{uuid.uuid4().hex}")
    loaded = CHECKPOINT.load(store, commit_state(store, first)).state()
    assert loaded.loss_scale == first.loss_scale == LossScale(512.0, good_steps=1)
    another, _ = half_run(tiny_model)
    another.weights.load(loaded.weights)
    resumed, again = run_update(another, loaded, config, epoch=1)
    assert_same_tensors(resumed.weights, straight.weights)
    assert_same_tensors(resumed.optimizer, straight.optimizer)
    assert resumed.loss_scale == straight.loss_scale == LossScale(512.0, good_steps=3)
    assert again == metrics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_know_no_scale(tiny_model: Path, dtype: str) -> None:
    policy, config = half_run(tiny_model, dtype=dtype)
    after, metrics = run_update(policy, initial_state(policy, ema=True), config)
    assert after.loss_scale is None and not {"loss_scale", "skipped_steps"} & metrics.keys()
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    assert CHECKPOINT.load(store, commit_state(store, after)).state().loss_scale is None


def test_the_scale_moves_as_torchs_own() -> None:
    """Compare with `torch.amp.GradScaler` over two overflows and the recovery from them."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=LossScale().value)
    scale = LossScale()
    for step in range(5000):
        overflow = step in (0, 900)
        scaler.scale(parameter.sum() * (torch.inf if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scale = scale.after_overflow() if overflow else scale.after_step()
        assert scale.value == scaler.get_scale()
    assert scale == LossScale(1024.0, good_steps=99)
    assert LossScale(1.0).after_overflow() == LossScale(1.0) and LossScale(1.0).least
