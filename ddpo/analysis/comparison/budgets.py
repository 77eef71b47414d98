"""What variants have learned for equal reward queries, equal forwards and equal time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpo.analysis.commit_times import commit_times, seconds_per_epoch
from ddpo.analysis.intervals import Interval, interval
from ddpo.runs import Run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT

Costs = Sequence[float]
"""What a run has cost when each reported epoch is sampled, the first of which is free."""


@dataclass(frozen=True)
class Spent:
    """A variant at a budget."""

    epochs: float
    """How many epochs of updates it had for the budget, mean over seeds."""
    reward: Interval
    """Its mean reward there, over seeds; interpolated between epochs."""


@dataclass(frozen=True)
class Budget:
    """What all variants could spend: what the cheapest one has spent in all its epochs."""

    unit: str
    """What is spent."""
    amount: float
    """How much of it."""
    variants: Mapping[str, Spent]
    """By variant."""


def at_equal_budget(
    unit: str,
    costs: Mapping[str, Sequence[Costs]],
    curves: Mapping[str, Sequence[Sequence[float]]],
) -> Budget:
    """Compare variants where they have spent the same.

    Args:
        unit: What is spent.
        costs: By variant, one row per seed, increasing.
        curves: By variant, one row per seed of mean rewards at those costs.
    """
    amount = min(row[-1] for rows in costs.values() for row in rows)
    variants = {}
    for name, rows in costs.items():
        reached = [float(np.interp(amount, row, range(len(row)))) for row in rows]
        rewards = [
            float(np.interp(amount, row, curve))
            for row, curve in zip(rows, curves[name], strict=True)
        ]
        variants[name] = Spent(float(np.mean(reached)), interval(rewards))
    return Budget(unit, amount, variants)


def forwards_of(run: Run, epochs: Sequence[int]) -> Costs | None:
    """Return a run's forwards before each epoch: of sampling and updates, an image each.

    Args:
        run: The run, whose first epoch is 0.
        epochs: 0, 1 and so on.

    Returns:
        None if a checkpoint does not state its forwards.
    """
    total = [0.0]
    for epoch in epochs[1:]:
        metrics = CHECKPOINT.require(run.store, Partition(run.run_id, epoch)).metrics
        if "forwards" not in metrics:
            return None
        total.append(total[-1] + metrics["forwards"] + metrics["sampling_forwards"])
    return total


def seconds_of(run: Run, epochs: Sequence[int]) -> Costs | None:
    """Return a run's seconds before each epoch, by the median time between two commits.

    Args:
        run: The run, whose first epoch is 0.
        epochs: 0, 1 and so on.

    Returns:
        None if the store keeps no times, or there is only one epoch.
    """
    seconds = seconds_per_epoch(commit_times(run, epochs))
    return None if not seconds else [epoch * seconds for epoch in epochs]
