"""Rewards to advantages: per-prompt statistics (arXiv 2305.13301, section 4.3) or the batch's.

Failed samples (reward NaN) stay out of every statistic. They get advantage 0, or, imputed, that of
their prompt's mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpo.algorithms.leave_one_out import leave_one_out
from ddpo.config import Advantages, LeaveOneOutAdvantages, PerPromptAdvantages
from ddpo.errors import RewardError
from ddpo.training.state import PromptStatistics

_STD_FLOOR = 1e-6


@dataclass(frozen=True)
class AdvantageBatch:
    """Advantages of one epoch and what each was normalised by.

    Attributes:
        advantages: [N] float64, clipped.
        mean: [N] float64.
        std: [N] float64, population standard deviation, without the floor of 1e-6.
        count: [N] int64, rewards behind mean and std; behind the mean, where one is left out.
        imputed: [N] bool, samples without a reward that count as their prompt's mean.
        statistics: What the next epoch starts from.
    """

    advantages: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    count: NDArray[np.int64]
    imputed: NDArray[np.bool_]
    statistics: PromptStatistics


def compute_advantages(
    config: Advantages,
    statistics: PromptStatistics,
    prompts: Sequence[str],
    rewards: NDArray[np.floating],
    *,
    impute: bool = False,
    shuffle_seed: int = 0,
) -> AdvantageBatch:
    """Normalise one epoch's rewards.

    Args:
        config: How. With a value function these are normalised rewards: the update, which has V,
            subtracts it.
        statistics: Rewards that earlier epochs left.
        prompts: N texts, in the order of ``sample_id``.
        rewards: [N]; NaN where scoring failed.
        impute: Whether failed samples count as their prompt's mean, where it has one.
        shuffle_seed: Decides the dealing of a control experiment (``config.shuffle``).

    Returns:
        The advantages and the statistics after them.

    Raises:
        RewardError: No sample has a reward.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    require_a_reward(rewards)
    mean, std, count = _moments(rewards)
    after = statistics
    if isinstance(config, PerPromptAdvantages):
        after = _per_prompt(config, statistics, prompts, rewards, (mean, std, count))
    elif isinstance(config, LeaveOneOutAdvantages):
        # The deviation stays the batch's: a prompt's few rewards would give one of mere chance.
        mean, count = leave_one_out(prompts, rewards)
    counted = imputed_rewards(prompts, rewards, after) if impute else rewards
    advantages = _normalise(counted, mean, std, config.clip)
    if config.shuffle:
        advantages = advantages[np.random.default_rng(shuffle_seed).permutation(len(rewards))]
    imputed = np.isfinite(counted) & ~np.isfinite(rewards)
    return AdvantageBatch(advantages, mean, std, count, imputed, after)


def _per_prompt(
    config: PerPromptAdvantages,
    statistics: PromptStatistics,
    prompts: Sequence[str],
    rewards: NDArray[np.float64],
    moments: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]],
) -> PromptStatistics:
    """Put a prompt's own moments in place of the batch's where there are enough rewards."""
    mean, std, count = moments
    names = np.asarray(prompts)
    scored = np.isfinite(rewards)
    after = dict(statistics)
    for prompt in dict.fromkeys(prompts):
        own = names == prompt
        # The current rewards are appended first: a prompt's statistics include them.
        history = (*after.get(prompt, ()), *map(float, rewards[own & scored]))
        after[prompt] = history[-config.buffer_size :]
        if len(after[prompt]) >= config.min_count:
            remembered = np.asarray(after[prompt])
            mean[own], std[own] = remembered.mean(), remembered.std()
            count[own] = len(remembered)
    return after


def require_a_reward(rewards: NDArray[np.float64]) -> None:
    """Refuse an epoch without any finite reward.

    Args:
        rewards: [N]; NaN where scoring failed.

    Raises:
        RewardError: No sample has a reward.
    """
    if not np.isfinite(rewards).any():
        raise RewardError(
            f"none of the {len(rewards)} samples of this epoch has a finite reward, so there is "
            "nothing to learn from; look at the status column of the epoch's rewards"
        )


def imputed_rewards(
    prompts: Sequence[str], rewards: NDArray[np.float64], statistics: PromptStatistics
) -> NDArray[np.float64]:
    """Put the prompt's mean, remembered or of this epoch, in place of rewards that failed.

    Args:
        prompts: N texts.
        rewards: [N]; NaN where scoring failed.
        statistics: Rewards that are remembered; a prompt without any has this epoch's.

    Returns:
        [N]; still NaN where a prompt has no reward at all.
    """
    names = np.asarray(prompts)
    whole = rewards.copy()
    for prompt in dict.fromkeys(names[~np.isfinite(rewards)].tolist()):
        own = names == prompt
        known = np.asarray(statistics.get(prompt, ())) if prompt in statistics else rewards[own]
        known = known[np.isfinite(known)]
        if len(known):
            whole[own & ~np.isfinite(rewards)] = known.mean()
    return whole


def _moments(
    rewards: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    scored = rewards[np.isfinite(rewards)]
    return (
        np.full(len(rewards), scored.mean()),
        np.full(len(rewards), scored.std()),
        np.full(len(rewards), len(scored), dtype=np.int64),
    )


def _normalise(
    rewards: NDArray[np.float64],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    clip: float,
) -> NDArray[np.float64]:
    advantages = np.clip((rewards - mean) / (std + _STD_FLOOR), -clip, clip)
    return np.where(np.isfinite(rewards), advantages, 0.0)
