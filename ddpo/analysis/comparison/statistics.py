"""Means over seeds, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: The mean.
        half_width: The interval is mean ± this; None of a single value, which says nothing of the
            spread.
    """

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        width = "" if self.half_width is None else f" ± {self.half_width:.4f}"
        return f"{self.mean:.4f}{width}"


def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t distribution.

    Args:
        probability: In (0, 1); 0.975 for a two-sided interval of 95%.
        freedom: Degrees of freedom, at least 1.

    Returns:
        The value that t stays below with that probability.
    """
    return float(stdtrit(freedom, probability))


def interval(values: Sequence[float]) -> Interval:
    """Estimate a mean from few independent values, normally distributed ones.

    mean ± t s / sqrt(n), t being the (1 + LEVEL) / 2 quantile of Student's distribution with n - 1
    degrees of freedom, s² = sum (x - mean)² / (n - 1).

    Args:
        values: n of them, at least one.

    Returns:
        The mean with its interval.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, None)
    t = t_quantile((1 + LEVEL) / 2, len(array) - 1)
    return Interval(mean, t * float(array.std(ddof=1)) / math.sqrt(len(array)))
