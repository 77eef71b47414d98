"""Advantages relative to a prompt's recent rewards (arXiv 2305.13301, section 4.3)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import PositiveInt, model_validator

from ddpo.algorithms.advantages.base import Advantages, Moments, batch_moments
from ddpo.algorithms.base import PromptStatistics, Scored


class PerPromptAdvantages(Advantages):
    """Advantage = (reward - mean) / std of the prompt's most recent rewards."""

    type: Literal["per_prompt"] = "per_prompt"
    buffer_size: PositiveInt = 16
    """The number of rewards remembered for each prompt."""
    min_count: PositiveInt = 16
    """A prompt with fewer remembered rewards is normalised by the whole batch instead."""

    @model_validator(mode="after")
    def _buffer_can_reach_min_count(self) -> PerPromptAdvantages:
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"min_count {self.min_count} is never reached by a buffer of {self.buffer_size}, "
                "so per-prompt statistics would never be used; "
                f"set min_count to at most {self.buffer_size}"
            )
        return self

    @property
    def has_prompt_statistics(self) -> bool:
        """Whether an epoch's advantages depend on rewards of earlier epochs: they do."""
        return True

    def moments(
        self, scored: Scored, statistics: PromptStatistics
    ) -> tuple[Moments, PromptStatistics]:
        """Return each prompt's moments, or the batch's where a prompt has too few rewards."""
        moments = batch_moments(scored.rewards)
        names = np.asarray(scored.prompts)
        finite = np.isfinite(scored.rewards)
        after = dict(statistics)
        for prompt in dict.fromkeys(scored.prompts):
            rows = names == prompt
            # The current rewards are appended first: a prompt's statistics include them.
            history = (*after.get(prompt, ()), *map(float, scored.rewards[rows & finite]))
            after[prompt] = history[-self.buffer_size :]
            if len(after[prompt]) >= self.min_count:
                remembered = np.asarray(after[prompt])
                moments.mean[rows], moments.std[rows] = remembered.mean(), remembered.std()
                moments.count[rows] = len(remembered)
        return moments, after
