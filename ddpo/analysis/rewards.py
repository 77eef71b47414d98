"""Summary statistics of rewards, and their course over a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ddpo.runs import Run
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES


@dataclass(frozen=True)
class RewardSummary:
    """Statistics of the rewards of an epoch; NaN if no sample has one."""

    scored: int
    """Samples with a reward."""
    failed: int
    """Samples without one."""
    mean: float
    std: float
    min: float
    max: float


def summarize(rewards: Iterable[float | None]) -> RewardSummary:
    """Summarize rewards; None stands for a sample that could not be scored."""
    listed = list(rewards)
    scored = np.asarray([reward for reward in listed if reward is not None], dtype=np.float64)
    if not len(scored):
        return RewardSummary(0, len(listed), *[float("nan")] * 4)
    return RewardSummary(
        scored=len(scored),
        failed=len(listed) - len(scored),
        mean=float(scored.mean()),
        std=float(scored.std()),
        min=float(scored.min()),
        max=float(scored.max()),
    )


@dataclass(frozen=True)
class EpochRewards:
    """The rewards of one epoch."""

    epoch: int
    """The epoch."""
    mean: float
    """Mean over its samples."""
    std: float
    """Standard deviation over its samples."""


def reward_curve(run: Run) -> list[EpochRewards]:
    """Return a run's rewards by epoch, as far as advantages are committed without a gap."""
    curve: list[EpochRewards] = []
    while True:
        epoch = run.first_epoch + len(curve)
        table = ADVANTAGES.get(run.store, Partition(run.run_id, epoch, reward_id=run.reward_id))
        if table is None:
            return curve
        rewards = summarize(row.reward for row in table.rows())
        curve.append(EpochRewards(epoch, rewards.mean, rewards.std))
