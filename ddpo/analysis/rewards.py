"""Summary statistics of rewards, and their course over a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ddpo.runs import Run
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, EPOCH
from ddpo.store.tables import AdvantageRow


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

    @property
    def constant(self) -> bool:
        """Whether several samples have one and the same reward, so that none is preferable."""
        return self.scored > 1 and self.min == self.max


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
    samples: int
    """Number of its samples."""
    failed: int
    """Samples that could not be scored."""
    imputed: int
    """Those of them that counted as their prompt's mean; the others were dropped."""
    constant: bool
    """Whether all samples have the same reward."""


def epoch_rewards(run: Run, epoch: int) -> EpochRewards | None:
    """Return the rewards of one epoch; None if its advantages are not committed."""
    table = ADVANTAGES.get(run.store, Partition(run.run_id, epoch, reward_id=run.reward_id))
    return None if table is None else rewards_of(epoch, table.rows())


def rewards_of(epoch: int, rows: Sequence[AdvantageRow]) -> EpochRewards:
    """Return the rewards of one epoch.

    Args:
        epoch: The epoch.
        rows: A row per sample.
    """
    rewards = summarize(row.reward for row in rows)
    return EpochRewards(
        epoch,
        rewards.mean,
        rewards.std,
        samples=len(rows),
        failed=rewards.failed,
        imputed=sum(row.status == "imputed" for row in rows),
        constant=rewards.constant,
    )


def reward_curve(run: Run) -> list[EpochRewards]:
    """Return a run's rewards by epoch, as far as advantages are committed without a gap."""
    curve: list[EpochRewards] = []
    while point := epoch_rewards(run, run.first_epoch + len(curve)):
        curve.append(point)
    return curve


def trained_curve(run: Run, known: Sequence[EpochRewards] = ()) -> list[EpochRewards]:
    """Return a run's rewards by epoch, as far as epochs are committed without a gap.

    Args:
        run: The run.
        known: The curve as far as it has been read before.
    """
    curve = list(known)
    while EPOCH.exists(run.store, Partition(run.run_id, run.first_epoch + len(curve))):
        point = epoch_rewards(run, run.first_epoch + len(curve))
        if point is None:
            break
        curve.append(point)
    return curve


def remarks(curve: Sequence[EpochRewards]) -> list[str]:
    """Return what a user should know about a run's rewards besides their mean; often nothing."""
    samples, failed, imputed = (
        sum(getattr(epoch, name) for epoch in curve) for name in ("samples", "failed", "imputed")
    )
    constant = sum(epoch.constant for epoch in curve)
    lines = []
    if failed:
        lines.append(
            f"{failed} of {samples} samples could not be scored: {imputed} imputed, "
            f"{failed - imputed} dropped"
        )
    if constant:
        lines.append(
            f"{constant} of {len(curve)} epochs had nothing to learn from: all of their samples "
            "had the same reward"
        )
    return lines
