"""Rewards to weights of the denoising loss: RWR and RWR-sparse (arXiv 2305.13301, section 4.1).

A sample of weight 0 is no part of what is trained on. Failed samples (reward NaN) have it; or,
imputed, they count as their prompt's mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ddpo.algorithms.advantages import imputed_rewards, require_a_reward
from ddpo.config import Regression, RwrConfig


@dataclass(frozen=True)
class WeightBatch:
    """Weights of one epoch's samples.

    Attributes:
        weights: [N] float64, at least 0.
        count: [N] int64, rewards that a sample's was weighed among, its own one of them.
        imputed: [N] bool, samples without a reward that count as their prompt's mean.
    """

    weights: NDArray[np.float64]
    count: NDArray[np.int64]
    imputed: NDArray[np.bool_]


def compute_weights(
    config: Regression,
    prompts: Sequence[str],
    rewards: NDArray[np.floating],
    *,
    impute: bool = False,
) -> WeightBatch:
    """Weigh one epoch's samples by their rewards.

    Args:
        config: RWR, whose weights have mean 1 over what shares a softmax; or RWR-sparse, whose
            weights are 1 or 0.
        prompts: N texts, in the order of ``sample_id``.
        rewards: [N]; NaN where scoring failed.
        impute: Whether failed samples count as their prompt's mean, where it has one.

    Returns:
        The weights.

    Raises:
        RewardError: No sample has a reward.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    require_a_reward(rewards)
    counted = imputed_rewards(prompts, rewards, {}) if impute else rewards
    known = np.isfinite(counted)
    weights = np.zeros(len(rewards))
    count = np.zeros(len(rewards), dtype=np.int64)
    whole = isinstance(config, RwrConfig) and config.weights_over == "data_set"
    for rows in _groups([""] * len(rewards) if whole else prompts, known):
        if isinstance(config, RwrConfig):
            weights[rows] = _scaled_softmax(config.beta * counted[rows])
        else:
            weights[rows] = _best(config.keep, counted[rows])
        count[rows] = len(rows)
    return WeightBatch(weights, count, known & ~np.isfinite(rewards))


def _groups(names: Sequence[str], known: NDArray[np.bool_]) -> Iterator[NDArray[np.intp]]:
    """Yield the rows of each name that have a reward, in their order."""
    array = np.asarray(names)
    for name in dict.fromkeys(array[known].tolist()):
        yield np.flatnonzero((array == name) & known)


def _scaled_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return n softmax(logits), of mean 1; the largest is subtracted first, so none overflows."""
    weights = np.exp(logits - logits.max())
    return weights / weights.mean()


def _best(keep: float, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 for the best share, 0 for the rest; of equal rewards the first come first."""
    # As the config has it, in decimals: 0.29 of 100 samples are 29, and not 28.999.
    number = max(int(Fraction(str(keep)) * len(rewards)), 1)
    order = np.argsort(-rewards, kind="stable")
    weights = np.zeros(len(rewards))
    weights[order[:number]] = 1.0
    return weights
