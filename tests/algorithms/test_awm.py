"""AWM's loss, with its gradient by hand in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddpo.algorithms import Awm
from tests.noised import KINDS, noised_batch, process_of_kind

TIMES = torch.tensor([999.0, 750.0, 250.0, 500.0])
ADVANTAGES = [-6.0, -1.25, 0.5, 4.0]  # the first is clipped

# Minus the log-prob of a squared distance d at time t, and its derivative by d.
WEIGHTINGS: dict[str, tuple[Callable[[float, float], float], Callable[[float, float], float]]] = {
    "uniform": (lambda d, t: d, lambda d, t: 1.0),
    "t": (lambda d, t: t * d, lambda d, t: t),
    "t_squared": (lambda d, t: t * t * d, lambda d, t: t * t),
    "huber": (
        lambda d, t: t * (math.sqrt(d + 1e-10) - 1e-5),
        lambda d, t: t / (2 * math.sqrt(d + 1e-10)),
    ),
    "ghuber": (
        lambda d, t: 4 * t * ((d + 1e-10) ** 0.25 - 1e-10**0.25),
        lambda d, t: t * (d + 1e-10) ** -0.75,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("updates", [1, 2])
def test_loss_and_gradient_are_those_of_the_formula(
    kind: str, weighting: Any, updates: int
) -> None:
    source = torch.Generator().manual_seed(3)
    clean, noise, new, old, base, start = (
        torch.randn(4, 2, 3, 3, generator=source, dtype=torch.float64) for _ in range(6)
    )
    start = new + 0.05 * start
    awm = Awm(
        type="awm",
        weighting=weighting,
        kl_weight=0.3,
        old_weight=0.7,
        updates_per_epoch=updates,
        clip_range=0.01,
    )
    process = process_of_kind(kind)
    others = {"old": old, "base": base, **({"start": start} if updates > 1 else {})}
    assert others.keys() == awm.needs.policies
    prediction = new.clone().requires_grad_()
    advantages = torch.tensor(ADVANTAGES)
    batch = noised_batch(process, clean, noise, TIMES, prediction, advantages, others)
    losses = awm.losses(batch)
    (found,) = torch.autograd.grad(losses.sum(), prediction)
    target = process.schedule.noised(clean, noise, TIMES)[1]
    minus, slope = WEIGHTINGS[weighting]
    for row in range(4):
        size, time = new[row].numel(), float(TIMES[row]) / 1000
        error = new[row] - target[row]
        distance = float((error**2).mean())
        before = float(((start[row] - target[row]) ** 2).mean()) if updates > 1 else distance
        ratio = math.exp(minus(before, time) - minus(distance, time))
        advantage = max(ADVANTAGES[row], -5.0) / 5
        clipped = min(max(ratio, 0.99), 1.01)
        expected = max(-advantage * ratio, -advantage * clipped)
        active = -advantage * ratio >= -advantage * clipped
        gradient = active * advantage * ratio * slope(distance, time) * 2 * error / size
        for other, weight in ((base, 0.3), (old, 0.7)):
            away = new[row] - other[row]
            expected += weight * float((away**2).mean())
            gradient = gradient + weight * 2 * away / size
        assert float(losses.detach()[row]) == pytest.approx(expected, rel=1e-6)
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[row], gradient, atol=1e-5 * largest, rtol=0)


def test_better_samples_are_matched_more_closely_and_worse_ones_less() -> None:
    awm = Awm(type="awm", weighting="uniform", kl_weight=0.0, old_weight=0.0)
    assert awm.needs.policies == frozenset()
    process = process_of_kind("velocity")
    clean, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    prediction = torch.zeros(2, 1, 2, 2, requires_grad=True)
    times, advantages = torch.tensor([500.0, 500.0]), torch.tensor([1.0, -1.0])
    batch = noised_batch(process, clean, noise, times, prediction, advantages, {})
    (gradient,) = torch.autograd.grad(awm.losses(batch).sum(), prediction)
    assert (gradient[0] < 0).all() and (gradient[1] > 0).all()  # the target is 1


def test_the_old_weights_follow_at_the_published_pace() -> None:
    awm = Awm(type="awm")
    assert [awm.decay_of_old(steps) for steps in (0, 100, 1000)] == pytest.approx([0, 0.1, 0.3])
