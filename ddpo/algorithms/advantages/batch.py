"""Advantages relative to the whole epoch."""

from __future__ import annotations

from typing import Literal

from ddpo.algorithms.advantages.base import Advantages, Moments, batch_moments
from ddpo.algorithms.base import PromptStatistics, Scored


class BatchAdvantages(Advantages):
    """Advantage = (reward - mean) / std over the whole epoch."""

    type: Literal["batch"]

    def moments(
        self, scored: Scored, statistics: PromptStatistics
    ) -> tuple[Moments, PromptStatistics]:
        """Return the batch's moments; nothing is remembered."""
        return batch_moments(scored.rewards), statistics
