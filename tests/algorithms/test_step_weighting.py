"""Weights of steps: the derivation's formulas in plain floats, and what they do to a gradient."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpo.algorithms import DdpoIs
from ddpo.algorithms.policy_gradient import PairBatch
from ddpo.algorithms.step_weighting import StepScales, equal_variance
from ddpo.config.files import parse_config
from ddpo.config.sampler import FlowSampler
from ddpo.diffusion import PROCESSES, Transition
from ddpo.models import Policy
from ddpo.models.flow_schedule import FlowSchedule
from ddpo.training.old_means import OldMeans
from ddpo.training.samples import Rollouts
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.checks import ddim, stable_diffusion_scheduler, take_gradients
from tests.tiny import (
    alternating_advantages,
    as_float64,
    draw,
    flat,
    grow_adapter,
    load_policy,
    make_float64,
    rollouts_of,
    tiny_config,
)


def ddim_by_hand(scheduler: DDIMScheduler, steps: int, kind: str) -> list[tuple[float, float]]:
    """Return sigma and |d mean / d prediction| of each step at eta 1 (DDIM, formulas 12 and 16)."""
    scheduler.set_timesteps(steps)
    alphas = [float(alpha) for alpha in scheduler.alphas_cumprod.double()]
    found = []
    for timestep in scheduler.timesteps.tolist():
        before = timestep - 1000 // steps
        now, then = alphas[timestep], alphas[before] if before >= 0 else alphas[0]
        variance = (1 - then) / (1 - now) * (1 - now / then)
        keeps = math.sqrt(1 - then - variance)
        if kind == "epsilon":
            slope = keeps - math.sqrt(then * (1 - now) / now)
        else:  # clean = sqrt(a) x - sqrt(1 - a) v, noise = sqrt(a) v + sqrt(1 - a) x
            slope = keeps * math.sqrt(now) - math.sqrt(then * (1 - now))
        found.append((math.sqrt(variance), abs(slope)))
    return found


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [50, 10])
def test_scales_of_ddim_are_those_of_its_formulas(kind: str, steps: int) -> None:
    scheduler = stable_diffusion_scheduler(prediction_type=kind)
    scales = ddim(scheduler, steps=steps).scales(range(steps))
    stds, slopes = zip(*ddim_by_hand(scheduler, steps, kind), strict=True)
    assert scales.stds.tolist() == pytest.approx(stds, rel=1e-5)
    assert scales.slopes.tolist() == pytest.approx(slopes, rel=1e-4)
    assert scales.lengths.tolist() == scales.slopes.tolist()


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "flow_cps"])
def test_scales_of_flows_are_those_of_their_formulas(kind: str) -> None:
    level, count = 0.6, 8
    raw = {"type": kind, "steps": count, "noise_level": level}
    config = parse_config(
        {
            "model": "starter",
            "prompts": {"name": "simple_animals"},
            "reward": {"name": "jpeg_compressibility"},
            "sampler": raw,
        },
        "a test's config",
    )
    sampler = config.sampler
    assert isinstance(sampler, FlowSampler)
    schedule = FlowSchedule.from_scheduler({"shift": 3.0}, 2, (16, 8, 8))
    flow = PROCESSES[kind](schedule, sampler, torch.device("cpu"))
    trained = flow.stochastic().nonzero().flatten().tolist()
    scales = flow.scales(trained)
    sigmas: list[float] = flow.sigmas.double().tolist()  # pyright: ignore[reportAttributeAccessIssue]
    for row, number in enumerate(trained):
        sigma, after = sigmas[number], sigmas[number + 1]
        dt = after - sigma
        if kind == "flow_sde":
            spread = level * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
            slope, std = (1 + spread**2 * (1 - sigma) / (2 * sigma)) * dt, spread * math.sqrt(-dt)
        elif kind == "dance_sde":
            slope = (1 + level**2 / 2 * (1 - sigma) / sigma) * dt
            std = level * math.sqrt(-dt)
        else:
            std = after * math.sin(level * math.pi / 2)
            slope = math.sqrt(after**2 - std**2) * (1 - sigma) - sigma * (1 - after)
        assert float(scales.stds[row]) == pytest.approx(std, rel=1e-5)
        assert float(scales.slopes[row]) == pytest.approx(abs(slope), rel=1e-4)
        assert float(scales.lengths[row]) == pytest.approx(-dt, rel=1e-5)


def test_weights_make_the_squared_scores_of_all_steps_equal() -> None:
    scales = ddim(stable_diffusion_scheduler(), steps=50).scales(range(50))
    weights = equal_variance(scales).double()
    scores = scales.slopes.double() / scales.stds.double()
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-6)
    squares = (weights * scores) ** 2
    assert squares.tolist() == pytest.approx([float(squares[0])] * 50, rel=1e-5)
    shares = scores**2 / (scores**2).sum()
    assert round(100 * float(shares[-2])) == 49  # without them


def test_the_kl_penalty_is_not_weighed() -> None:
    algorithm = DdpoIs(step_weighting="variance", kl_weight=0.5)
    source = torch.Generator().manual_seed(0)
    mean, base = torch.randn((2, 3, 1, 2, 2), generator=source, dtype=torch.float64)
    stds = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    weights = algorithm.step_weights(StepScales(stds, torch.ones(3).double(), stds))
    assert weights is not None
    current, other = (Transition(each, stds.reshape(3, 1, 1, 1)) for each in (mean, base))
    zeros = torch.zeros(3, dtype=torch.float64)
    batch = PairBatch(zeros, zeros, advantages, current, other, step_weights=weights)
    divergence = ((mean - base) ** 2).mean(dim=(1, 2, 3)) / (2 * stds**2)
    expected = -advantages * stds / stds.mean() + 0.5 * divergence
    torch.testing.assert_close(algorithm.losses(batch), expected, rtol=1e-12, atol=0)


ROWS = range(4)
ADVANTAGES = alternating_advantages(8)


def gradient_with(policy: Policy, rollouts: Rollouts, window: int | None, **options: str) -> Tensor:
    """Return the gradient of an update on policy, of all steps or of a window of one."""
    sampler = {} if window is None else {"window": {"steps": 1, "position": window}}
    config = tiny_config(policy.folder, algorithm=options, sampler=sampler)
    algorithm = config.algorithm
    assert isinstance(algorithm, DdpoIs)
    gradient = TrajectoryGradient(policy, config.sampler, algorithm)
    means = OldMeans(gradient.mine(ROWS), rollouts.log_probs.shape)
    old = gradient.recompute(rollouts, ROWS, means)
    gradient.accumulate(rollouts, ADVANTAGES, ROWS, old, old_means=means)
    return flat(take_gradients(policy))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_an_updates_gradient_is_the_weighted_mean_of_its_steps_own(
    tiny_model: Path, tiny_v_model: Path, rollouts_in_float64, kind: str
) -> None:
    """Also with GRPO-Guard's ratio, whose steps weigh std / slope before any update."""
    policy, rollouts = rollouts_in_float64(tiny_model if kind == "epsilon" else tiny_v_model)
    alone = [gradient_with(policy, rollouts, window=step) for step in range(4)]
    scheduler = DDIMScheduler.from_config(policy.pipeline.scheduler.config)
    weights = [std / slope for std, slope in ddim_by_hand(scheduler, 4, kind)]
    mean = sum(weights) / 4
    guarded = sum(w * each for w, each in zip(weights, alone, strict=True)) / 4
    largest = float(guarded.abs().max())
    assert max(weights) > 3 * min(weights) and largest > 1e-4
    for found, expected in (
        (gradient_with(policy, rollouts, None, step_weighting="variance"), guarded / mean),
        (gradient_with(policy, rollouts, None, ratio="guard"), guarded),
        (gradient_with(policy, rollouts, None), sum(alone) / 4),
    ):
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.fixture
def rollouts_in_float64():
    def made(folder: Path) -> tuple[Policy, Rollouts]:
        config = tiny_config(folder)
        policy = load_policy(config)
        grow_adapter(policy)
        rollouts = as_float64(rollouts_of(draw(policy, config)))
        make_float64(policy)
        return policy, rollouts

    return made
