"""Credit of a few samples in one call, under the names of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpo.algorithms.advantages import Advantages
from ddpo.algorithms.base import PromptStatistics, Scored
from ddpo.algorithms.rwr import Regression


@dataclass(frozen=True)
class Normalised:
    advantages: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    count: NDArray[np.int64]
    imputed: NDArray[np.bool_]
    statistics: PromptStatistics


@dataclass(frozen=True)
class Weighted:
    weights: NDArray[np.float64]
    count: NDArray[np.int64]
    imputed: NDArray[np.bool_]


def compute_advantages(
    config: Advantages,
    statistics: PromptStatistics,
    prompts: Sequence[str],
    rewards: NDArray[np.float64],
    *,
    impute: bool = False,
    shuffle_seed: int = 0,
    samples_per_prompt: int = 1,
) -> Normalised:
    scored = Scored(prompts, rewards, samples_per_prompt, impute, shuffle_seed)
    found = config.compute(scored, statistics)
    columns = (found.columns[name] for name in ("advantage", "mean", "std"))
    return Normalised(*columns, found.count, found.imputed, found.statistics)


def compute_weights(
    config: Regression,
    prompts: Sequence[str],
    rewards: NDArray[np.float64],
    *,
    impute: bool = False,
) -> Weighted:
    statistics = {"a": (1.0,)}
    found = config.credit(Scored(prompts, rewards, impute=impute), statistics)
    assert found.statistics == statistics  # a regression neither uses nor changes them
    return Weighted(found.columns["weight"], found.count, found.imputed)
