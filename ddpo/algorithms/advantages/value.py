"""Advantages relative to a learned value function."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from ddpo.algorithms.advantages.base import Advantages, CriticSettings, Moments, batch_moments
from ddpo.algorithms.base import PromptStatistics, Scored
from ddpo.basics.limits import LARGEST_RATE


class ValueAdvantages(Advantages):
    """Advantage = (reward - mean) / std over the whole epoch, minus a learned V(prompt, timestep).

    V is a small network on the prompt's embedding, trained on each epoch's rewards after the
    policy's updates (`ddpo/training/critic.py`). It carries over from epoch to epoch and
    generalises to unseen prompts: meant for prompt sets so large that each prompt is sampled too
    rarely for statistics of its own.
    """

    type: Literal["value"]
    clip: PositiveFloat = 5.0
    """Normalised rewards, and then advantages, are clipped to plus and minus this."""
    shuffle: bool = False
    """Control experiment: permute the rewards among the samples, so that nothing can be learned
    from them."""
    value_epochs: PositiveInt = 10
    """Steps of AdamW that V takes after each epoch's updates, each on all samples."""
    value_learning_rate: float = Field(default=1e-3, gt=0.0, le=LARGEST_RATE)
    """Learning rate of V; the policy's is `optimizer.learning_rate`."""

    @property
    def critic(self) -> CriticSettings:
        """The value function that the update subtracts."""
        return CriticSettings(self.clip, self.value_epochs, self.value_learning_rate)

    def moments(
        self, scored: Scored, statistics: PromptStatistics
    ) -> tuple[Moments, PromptStatistics]:
        """Return the batch's moments: the update, which has V, subtracts it."""
        return batch_moments(scored.rewards), statistics
