"""GRPO-Guard's ratio and Flow-DPPO's mask, against their formulas in float64, with gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpo.algorithms import DdpoIs
from ddpo.algorithms.policy_gradient import PairBatch
from ddpo.algorithms.step_weighting import StepScales
from ddpo.diffusion import Transition
from ddpo.errors import ConfigError
from tests.configs import parse
from tests.tiny import tiny_config

N, SHAPE = 6, (2, 3, 3)
DIMENSIONS = math.prod(SHAPE)


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ADVANTAGES = torch.tensor([1.5, -1.0, 0.5, -2.0, 1.0, -0.5], dtype=torch.float64)
STDS = torch.tensor([0.04, 0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
OLD = randoms(N, *SHAPE)
NOISE = randoms(N, *SHAPE, seed=1)
NEXT = OLD + STDS.reshape(N, 1, 1, 1) * NOISE


def batch_at(mean: Tensor, weights: Tensor | None = None) -> PairBatch:
    """Return pairs drawn by the old policy, as a policy with other means sees them."""
    std = STDS.reshape(N, 1, 1, 1)
    current, old = Transition(mean, std), Transition(OLD, std)
    return PairBatch(
        current.log_prob(NEXT),
        old.log_prob(NEXT),
        ADVANTAGES,
        current,
        old_mean=OLD,
        step_weights=weights,
    )


def gradient_of(losses: Tensor, mean: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(losses.sum(), mean)
    return found


def test_guards_ratio_is_the_mean_of_noise_times_drift_and_losses_are_per_length() -> None:
    """exp(s (log rho + mean drift² / (2 s²))) = exp(mean eps drift), whatever s is."""
    algorithm = DdpoIs(ratio="guard", clip_range=10.0)
    lengths = torch.tensor([0.02, 0.05, 0.1, 0.1, 0.2, 0.3], dtype=torch.float64)
    weights = algorithm.step_weights(StepScales(STDS, STDS, lengths))
    drift = 0.2 * randoms(N, *SHAPE, seed=2)
    mean = (OLD + drift).requires_grad_()
    found = algorithm.losses(batch_at(mean, weights))
    ratio = torch.exp((NOISE * drift).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found.detach(), -ADVANTAGES * ratio / lengths, rtol=1e-10, atol=0)
    each = (-ADVANTAGES * ratio / lengths / DIMENSIONS).reshape(N, 1, 1, 1)
    torch.testing.assert_close(gradient_of(found, mean), each * NOISE, rtol=1e-9, atol=1e-12)
    assert (ratio - 1).abs().min() > 1e-3


def test_guards_ratio_is_clipped_to_the_published_range() -> None:
    algorithm = DdpoIs(ratio="guard")
    assert algorithm.clip_range == 2e-6
    for size, left in ((1e-8, False), (1e-2, True)):
        # Half of the drifts go with the noise, and half against it.
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0]).reshape(N, 1, 1, 1)
        drift = size * signs * NOISE
        mean = (OLD + drift).requires_grad_()
        batch = batch_at(mean)
        ratio = torch.exp((NOISE * drift).mean(dim=(1, 2, 3)))
        clipped = ratio.clamp(1 - 2e-6, 1 + 2e-6)
        expected = torch.maximum(-ADVANTAGES * ratio, -ADVANTAGES * clipped)
        found = algorithm.losses(batch)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=0)
        lost = (ratio > 1 + 2e-6) & (ADVANTAGES > 0) | (ratio < 1 - 2e-6) & (ADVANTAGES < 0)
        assert lost.any() == left and not lost.all()
        reached = gradient_of(found, mean).abs().sum(dim=(1, 2, 3)) > 0
        assert reached.tolist() == (~lost).tolist()
        share, divergence = algorithm.measured(batch)
        assert share.tolist() == [float(left)] * N
        expected = (drift**2).mean(dim=(1, 2, 3)) / (2 * STDS**2)
        torch.testing.assert_close(divergence, expected, rtol=1e-6, atol=0)
    assert algorithm.measures == ("clip_fraction", "kl_to_old")


def exact_kl(mean: Tensor) -> Tensor:
    std = STDS.reshape(N, 1, 1, 1)
    return kl_divergence(Normal(mean, std), Normal(OLD, std)).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("distance", [0.5, 2.0])
def test_the_kl_mask_drops_what_is_too_far_and_goes_further(distance: float) -> None:
    """Each pair at `distance` limits; those that return, and those within, keep all of A rho."""
    limit = 1e-3
    algorithm = DdpoIs(clip="kl_mask", kl_limit=limit)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0]).reshape(N, 1, 1, 1)
    # Along the noise: with it the drawn latents get likelier, against it unlikelier.
    unit = NOISE / (NOISE**2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
    drift = signs * unit * STDS.reshape(N, 1, 1, 1) * math.sqrt(2 * limit * distance)
    mean = (OLD + drift).requires_grad_()
    torch.testing.assert_close(
        exact_kl(mean.detach()),
        torch.full((N,), limit * distance, dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    std = STDS.reshape(N, 1, 1, 1)
    old, new = (Normal(m, std).log_prob(NEXT).mean(dim=(1, 2, 3)) for m in (OLD, mean.detach()))
    ratio = (new - old).exp()
    assert (ratio > 1).tolist() == (signs.flatten() > 0).tolist()
    further = torch.tensor([True, False, False, True, True, True])
    kept = ~further if distance >= 1 else torch.ones(N, dtype=torch.bool)
    batch = batch_at(mean)
    found = algorithm.losses(batch)
    torch.testing.assert_close(found.detach(), -ADVANTAGES * ratio * kept, rtol=1e-9, atol=0)
    each = (-ADVANTAGES * ratio * kept / DIMENSIONS).reshape(N, 1, 1, 1)
    score = (NEXT - mean.detach()) / std**2
    torch.testing.assert_close(gradient_of(found, mean), each * score, rtol=1e-9, atol=1e-12)
    dropped, _ = algorithm.measured(batch)
    assert dropped.tolist() == (~kept).double().tolist()


def test_at_the_limit_itself_a_pair_is_dropped() -> None:
    batch = batch_at(OLD + 0.01 * NOISE)
    divergence = exact_kl(OLD + 0.01 * NOISE)
    for row in (0, 4):  # likelier, and better
        limit = float(batch.kl_to_old[row])
        assert limit == pytest.approx(float(divergence[row]))
        at, above = (
            DdpoIs(clip="kl_mask", kl_limit=each).losses(batch)[row]
            for each in (limit, limit * (1 + 1e-12))
        )
        assert float(at) == 0.0 and float(above) < 0.0


def test_the_published_settings_are_the_defaults_and_others_change_no_identity() -> None:
    assert DdpoIs(clip="kl_mask").kl_limit == 1e-5
    dumped = DdpoIs().model_dump()
    assert not {"ratio", "clip", "kl_limit", "step_weighting"} & dumped.keys()
    assert dumped["clip_range"] == 1e-4 and "zero_spread" not in str(dumped)
    for options in ({"ratio": "guard"}, {"clip": "kl_mask"}, {"step_weighting": "variance"}):
        config = parse(algorithm={"type": "ddpo_is", **options})
        assert parse(**config.whole()) == config
    given = parse(algorithm={"type": "ddpo_is", "ratio": "guard", "clip_range": 1e-5})
    assert given.algorithm.model_dump()["clip_range"] == 1e-5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": "guard", "clip": "kl_mask"}, "clip is kl_mask with `ratio: guard`"),
        ({"clip": "kl_mask", "clip_range": 1e-3}, "clip_range 0.001 has no effect with `clip: kl"),
        ({"kl_limit": 1e-3}, "kl_limit 0.001 has no effect with `clip: ratio`; set clip_range"),
        ({"ratio": "guard", "step_weighting": "variance"}, "which weighs the steps already"),
        ({"ratio": "guard", "old_log_probs": "stored"}, "stored with `ratio: guard`, which comp"),
        ({"clip": "kl_mask", "old_log_probs": "stored"}, "stored with `clip: kl_mask`, which com"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(algorithm={"type": "ddpo_is", **options})
    assert told in str(refused.value)


def test_what_guard_and_mask_cannot_compute_is_refused(tiny_model: Path) -> None:
    fork = {"run_id": "parent", "epoch": 1, "off_policy": True}
    for options in ({"ratio": "guard"}, {"clip": "kl_mask"}):
        with pytest.raises(ConfigError, match=r"with fork\.off_policy: it compares with the means"):
            tiny_config(tiny_model, algorithm=options, fork=fork)
    sampler = {"type": "flow_cps", "steps": 4}
    guard = {"type": "ddpo_is", "ratio": "guard"}
    with pytest.raises(ConfigError, match=r"guard, which needs log-densities.*flow_sde or dance"):
        parse(algorithm=guard, sampler=sampler)
    assert parse(algorithm=guard, sampler={**sampler, "type": "dance_sde"})
    assert parse(algorithm={"type": "ddpo_is", "clip": "kl_mask"}, sampler=sampler)
