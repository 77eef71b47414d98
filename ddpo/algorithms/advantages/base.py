"""What all advantages share: imputation, normalisation, clipping, and the shuffled control.

Failed samples (reward NaN) stay out of every statistic. Their advantage is 0 or, imputed, that of
their prompt's mean. Shapes: S samples of an epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat

from ddpo.algorithms.base import (
    Credit,
    PromptStatistics,
    Scored,
    imputed_rewards,
    require_a_reward,
)
from ddpo.basics.part import Part

if TYPE_CHECKING:
    from torch import Tensor

_STD_FLOOR = 1e-6


@dataclass(frozen=True)
class Moments:
    """What rewards are normalised by, [S] each."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    """Population standard deviation, without the floor of 1e-6."""
    count: NDArray[np.int64]
    """The number of rewards behind mean and deviation; behind the mean, where they differ."""


@dataclass(frozen=True)
class CriticSettings:
    """How a value function is trained, and what its advantages are clipped to."""

    clip: float
    epochs: int
    """Steps of AdamW after each epoch's updates."""
    learning_rate: float


class Advantages(Part, ABC):
    """A kind of advantage: (reward - mean) / (std + 1e-6), clipped."""

    type: Any
    """The kind's name."""
    clip: PositiveFloat = 5.0
    """Advantages are clipped to plus and minus this: 5 with LoRA, 10 with full fine-tuning."""
    shuffle: bool = False
    """Control experiment: permute the advantages among the samples, so that nothing can be
    learned from the reward."""

    @property
    def has_prompt_statistics(self) -> bool:
        """Whether an epoch's advantages depend on rewards of earlier epochs."""
        return False

    @property
    def compares_groups(self) -> bool:
        """Whether a sample is compared with its group alone."""
        return False

    @property
    def critic(self) -> CriticSettings | None:
        """The value function that the update subtracts, if there is one."""
        return None

    @abstractmethod
    def moments(
        self, scored: Scored, statistics: PromptStatistics
    ) -> tuple[Moments, PromptStatistics]:
        """Return what rewards are normalised by, and the statistics after this epoch."""

    def compute(self, scored: Scored, statistics: PromptStatistics) -> Credit:
        """Normalise one epoch's rewards.

        Args:
            scored: The epoch's samples.
            statistics: Rewards that earlier epochs left.

        Returns:
            Columns ``advantage``, clipped, and ``mean`` and ``std``, what it was normalised by.

        Raises:
            RewardError: No sample has a reward.
        """
        require_a_reward(scored.rewards)
        moments, after = self.moments(scored, statistics)
        rewards = self.imputed(scored, moments, after) if scored.impute else scored.rewards
        advantages = self.normalised(scored, rewards, moments)
        if self.shuffle:
            order = np.random.default_rng(scored.shuffle_seed).permutation(len(advantages))
            advantages = advantages[order]
        imputed = np.isfinite(rewards) & ~np.isfinite(scored.rewards)
        columns = {"advantage": advantages, "mean": moments.mean, "std": moments.std}
        return Credit(columns, moments.count, imputed, after)

    def normalised(
        self, scored: Scored, rewards: NDArray[np.float64], moments: Moments
    ) -> NDArray[np.float64]:
        """Return the advantages [S] of rewards that may be imputed, clipped."""
        return normalise(rewards, moments, self.clip)

    def imputed(
        self, scored: Scored, moments: Moments, statistics: PromptStatistics
    ) -> NDArray[np.float64]:
        """Return the rewards [S] with those that failed replaced, NaN where nothing is known."""
        return imputed_rewards(scored.prompts, scored.rewards, statistics)

    def metrics(self, credit: Mapping[str, Tensor], samples_per_prompt: int) -> dict[str, float]:
        """Return what is worth showing of an epoch's advantages, by name."""
        return {}

    def check_groups(self, samples_per_prompt: int) -> None:
        """Check the size of groups.

        Raises:
            ValueError: This kind cannot work with groups of that size.
        """

    def trained(self, credit: Mapping[str, Tensor]) -> Sequence[int]:
        """Return the rows of an epoch's samples that updates see; by default all.

        Args:
            credit: The epoch's credit table, [S] each.
        """
        return range(len(credit["advantage"]))


def batch_moments(rewards: NDArray[np.float64]) -> Moments:
    """Return mean and deviation of the whole batch, for each of its samples.

    Args:
        rewards: [S]; NaN where scoring failed, at least one finite.
    """
    finite = rewards[np.isfinite(rewards)]
    return Moments(
        np.full(len(rewards), finite.mean()),
        np.full(len(rewards), finite.std()),
        np.full(len(rewards), len(finite), dtype=np.int64),
    )


def normalise(rewards: NDArray[np.float64], moments: Moments, clip: float) -> NDArray[np.float64]:
    """Return clip((rewards - mean) / (std + 1e-6)), 0 where there is no reward.

    Args:
        rewards: [S]; NaN where there is none.
        moments: Of the same samples.
        clip: The largest absolute value.
    """
    advantages = np.clip((rewards - moments.mean) / (moments.std + _STD_FLOOR), -clip, clip)
    return np.where(np.isfinite(rewards), advantages, 0.0)
