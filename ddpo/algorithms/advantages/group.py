"""Advantages relative to a sample's group, as in GRPO (arXiv 2402.03300, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ddpo.algorithms.advantages.base import Advantages, Moments, batch_moments
from ddpo.algorithms.base import PromptStatistics, Scored

if TYPE_CHECKING:
    from torch import Tensor


class GroupAdvantages(Advantages):
    """Advantage = (reward - mean of the group) / std of the group, or of the whole epoch.

    A group is `rollouts.samples_per_prompt` consecutive samples, which share a prompt. A group
    whose rewards are all equal says nothing of what is better, and its advantages are 0.
    """

    type: Literal["group"]
    deviation: Literal["group", "batch"] = "group"
    """What the difference is divided by. `group` gives every group the same weight, also those in
    which samples hardly differ; `batch` keeps the differences of groups in proportion."""

    def check_groups(self, samples_per_prompt: int) -> None:
        """Check that a group has more than one sample."""
        if samples_per_prompt == 1:
            raise ValueError(
                "algorithm.advantages.type is group and rollouts.samples_per_prompt is 1: a single "
                "sample has nothing to be compared with, so every advantage would be 0; set "
                "rollouts.samples_per_prompt to at least 2"
            )

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

    def imputed(
        self, scored: Scored, moments: Moments, statistics: PromptStatistics
    ) -> NDArray[np.float64]:
        """Return the rewards [S] with those that failed replaced by their group's mean."""
        failed = ~np.isfinite(scored.rewards) & (moments.count > 0)
        return np.where(failed, moments.mean, scored.rewards)

    def metrics(self, credit: Mapping[str, Tensor], samples_per_prompt: int) -> dict[str, float]:
        """Return ``zero_spread_groups``: how many groups teach nothing."""
        groups = credit["reward"].reshape(-1, samples_per_prompt)
        lowest = groups.nan_to_num(nan=float("inf")).amin(dim=1)
        highest = groups.nan_to_num(nan=float("-inf")).amax(dim=1)
        return {"zero_spread_groups": int((lowest >= highest).sum())}
