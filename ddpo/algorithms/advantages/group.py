"""Advantages relative to a sample's group, as in GRPO (arXiv 2402.03300, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ddpo.algorithms.advantages.base import Advantages, Moments, batch_moments, normalise
from ddpo.algorithms.base import PromptStatistics, Scored

if TYPE_CHECKING:
    from torch import Tensor


def _is_kept(value: str) -> bool:
    return value == "keep"


class GroupAdvantages(Advantages):
    """Advantage = (reward - mean of the group) / std of the group, or of the whole epoch.

    A group is `rollouts.samples_per_prompt` consecutive samples, which share a prompt. A group
    whose rewards are all equal says nothing of what is better, and its advantages are 0.
    """

    type: Literal["group"]
    deviation: Literal["group", "batch"] = "group"
    """What the difference is divided by. `group` gives every group the same weight, also those in
    which samples hardly differ; `batch` keeps the differences of groups in proportion."""
    zero_spread: Literal["keep", "drop"] = Field(default="keep", exclude_if=_is_kept)
    """What updates do with samples of advantage 0, as all of a group of equal rewards have. `drop`
    leaves them out, as Flow-GRPO does: the mean loss is then over samples that teach something, and
    forwards are saved. Where no sample has another advantage, all are kept."""

    def check_groups(self, samples_per_prompt: int) -> None:
        """Check that a group has more than one sample."""
        if samples_per_prompt == 1:
            raise ValueError(
                "algorithm.advantages.type is group and rollouts.samples_per_prompt is 1: a single "
                "sample has nothing to be compared with, so every advantage would be 0; set "
                "rollouts.samples_per_prompt to at least 2"
            )

    @property
    def compares_groups(self) -> bool:
        """It does."""
        return True

    def moments(
        self, scored: Scored, statistics: PromptStatistics
    ) -> tuple[Moments, PromptStatistics]:
        """Return each group's mean and the deviation; a group without any reward has count 0."""
        moments = batch_moments(scored.rewards)
        size = scored.samples_per_prompt
        for start in range(0, len(scored.rewards), size):
            rows = slice(start, start + size)
            rewards = scored.rewards[rows]
            rewards = rewards[np.isfinite(rewards)]
            moments.count[rows] = len(rewards)
            if not len(rewards):
                continue
            equal = rewards.min() == rewards.max()
            # Exactly, so that advantages are 0 and not a rounding error over the floor of 1e-6.
            moments.mean[rows] = rewards[0] if equal else rewards.mean()
            if self.deviation == "group":
                moments.std[rows] = 0.0 if equal else rewards.std()
        return moments, statistics

    def normalised(
        self, scored: Scored, rewards: NDArray[np.float64], moments: Moments
    ) -> NDArray[np.float64]:
        """Return the advantages; of a sum by parts, the weighted sum of those of its parts.

        As in MixGRPO (arXiv 2507.21802): rewards of any units and spreads then count by their
        weights alone. A sample that failed counts for no part, and has advantage 0.
        """
        if not scored.parts:
            return super().normalised(scored, rewards, moments)
        known = np.isfinite(scored.rewards)
        total = np.zeros(len(scored.rewards))
        for part in scored.parts:
            alone = replace(scored, rewards=np.where(known, part.rewards, np.nan), parts=())
            own, _ = self.moments(alone, {})
            total += part.weight * normalise(alone.rewards, own, np.inf)
        return np.clip(total, -self.clip, self.clip)

    def imputed(
        self, scored: Scored, moments: Moments, statistics: PromptStatistics
    ) -> NDArray[np.float64]:
        """Return the rewards [S] with those that failed replaced by their group's mean."""
        failed = ~np.isfinite(scored.rewards) & (moments.count > 0)
        return np.where(failed, moments.mean, scored.rewards)

    def metrics(self, credit: Mapping[str, Tensor], samples_per_prompt: int) -> dict[str, float]:
        """Return ``zero_spread_groups``: how many groups teach nothing.

        With `zero_spread: drop` also ``trained_samples``: how many samples updates see.
        """
        groups = credit["reward"].reshape(-1, samples_per_prompt)
        lowest = groups.nan_to_num(nan=float("inf")).amin(dim=1)
        highest = groups.nan_to_num(nan=float("-inf")).amax(dim=1)
        found: dict[str, float] = {"zero_spread_groups": int((lowest >= highest).sum())}
        if self.zero_spread == "drop":
            found["trained_samples"] = len(self.trained(credit))
        return found

    def trained(self, credit: Mapping[str, Tensor]) -> Sequence[int]:
        """Return the rows that updates see, in their order."""
        every = range(len(credit["advantage"]))
        if self.zero_spread == "keep":
            return every
        return credit["advantage"].nonzero().flatten().tolist() or every
