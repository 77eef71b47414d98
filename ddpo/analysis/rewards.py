"""Summary statistics of rewards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


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
