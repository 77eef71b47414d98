"""The policy gradient: of any micro-batches, of each sample, in any precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpo.config import RunConfig
from ddpo.models import Policy
from ddpo.training.loop import initial_state, update
from ddpo.training.pairs import micro_batches
from ddpo.training.samples import Rollouts
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.checks import accumulated, check_gradient_is_each_samples_own, take_gradients
from tests.tiny import (
    PROMPTS,
    alternating_advantages,
    as_credit,
    as_float64,
    assert_same_tensors,
    draw,
    flat,
    grow_adapter,
    load_policy,
    make_float64,
    rollouts_of,
    tiny_config,
)

ADVANTAGES = alternating_advantages(8)
CREDIT = as_credit(ADVANTAGES)


def test_micro_batches_cover_every_pair_once_timestep_by_timestep() -> None:
    batches = list(micro_batches([4, 5, 6], [0, 2], 2))
    pairs = [(int(s), int(t)) for b in batches for s, t in zip(b.samples, b.steps, strict=True)]
    assert pairs == [(4, 0), (5, 0), (6, 0), (4, 2), (5, 2), (6, 2)]
    assert [len(b.samples) for b in batches] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_sf"])
def test_micro_batches_of_any_size_give_the_gradient_of_one_backward_over_everything(
    policy: Policy, config: RunConfig, rollouts: Rollouts, algorithm: str
) -> None:
    make_float64(policy)
    exact = as_float64(rollouts)
    updates = 2 if algorithm == "ddpo_is" else 1
    config = tiny_config(policy.folder, algorithm={"type": algorithm, "updates_per_epoch": updates})
    noise = torch.randn(exact.log_probs.shape, generator=torch.Generator().manual_seed(0))
    old = exact.log_probs + 2e-4 * noise  # ratios on both sides of the clip range, and inside

    gradient = TrajectoryGradient(policy, config.sampler, config.algorithm)
    (everything,) = micro_batches(range(8), gradient.trained_steps(), 32)
    log_probs = gradient.log_probs(exact, everything)
    assert log_probs.dtype == torch.float64
    advantages = ADVANTAGES[everything.samples].double()
    if algorithm == "ddpo_is":
        ratio = (log_probs - old[everything.samples, everything.steps]).exp()
        clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        outside = float(((ratio - 1).abs() > 1e-4).double().mean())
        assert 0.2 < outside < 0.9
    else:
        loss = (-advantages * log_probs).mean()
    loss.backward()
    expected, whole_loss = flat(take_gradients(policy)), float(loss.detach())
    assert expected.abs().max() > 1e-3

    for micro in (1, 3, 7, 32):
        found_loss, found = accumulated(policy, config, exact, old, micro)
        assert found_loss == pytest.approx(whole_loss, abs=1e-10)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_gradient_is_each_samples_advantage_times_its_score(
    tiny_model: Path, tiny_v_model: Path, kind: str
) -> None:
    config = tiny_config(tiny_model if kind == "epsilon" else tiny_v_model)
    policy = load_policy(config)
    grow_adapter(policy)
    rollouts = as_float64(rollouts_of(draw(policy, config, PROMPTS[:4]), PROMPTS[:4]))
    make_float64(policy)
    check_gradient_is_each_samples_own(policy, config, rollouts, alternating_advantages(4))


def test_gradient_checkpointing_changes_no_bit(tiny_model: Path) -> None:
    found = []
    for checkpointing in (False, True):
        config = tiny_config(tiny_model, numerics={"gradient_checkpointing": checkpointing})
        policy = load_policy(config)
        assert policy.pipeline.unet.is_gradient_checkpointing == checkpointing
        drawn = rollouts_of(draw(policy, config))
        found.append(update(policy, initial_state(policy), drawn, CREDIT, {}, config)[0])
    assert_same_tensors(found[1].weights, found[0].weights)


def test_the_loss_scale_of_float16_leaves_the_gradient_as_it_is(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    make_float64(policy)
    exact = as_float64(rollouts)
    unscaled, expected = accumulated(policy, config, exact, exact.log_probs, 8)
    policy.numerics = policy.numerics.model_copy(update={"dtype": "float16"})
    scaled = TrajectoryGradient(policy, config.sampler, config.algorithm)
    assert scaled.loss_scale is not None and scaled.loss_scale.value > 1
    # Of the scaled loss, inside the network; the float64 weights compute it without rounding.
    policy.numerics = policy.numerics.model_copy(update={"dtype": "float32"})
    loss = scaled.accumulate(exact, ADVANTAGES, range(8), exact.log_probs).loss
    assert loss == pytest.approx(unscaled, abs=1e-10)
    torch.testing.assert_close(flat(take_gradients(policy)), expected, rtol=0, atol=1e-10)
