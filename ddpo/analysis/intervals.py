"""Means with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Confidence level of all intervals."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    """The mean."""
    half_width: float | None
    """The interval is mean ± this; None for a single value, which has no spread."""

    def __str__(self) -> str:
        width = "" if self.half_width is None else f" ± {self.half_width:.4f}"
        return f"{self.mean:.4f}{width}"


def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t distribution.

    Args:
        probability: In (0, 1); 0.975 for a two-sided 95% interval.
        freedom: Degrees of freedom, at least 1.
    """
    from scipy.special import stdtrit  # slow to import, and a report only shows intervals

    return float(stdtrit(freedom, probability))


def interval(values: Sequence[float]) -> Interval:
    """Estimate the mean of a normal distribution from a few independent values.

    The interval is mean ± t s / sqrt(n), where t is the (1 + LEVEL) / 2 quantile of Student's
    distribution with n - 1 degrees of freedom and s² = sum (x - mean)² / (n - 1).

    Args:
        values: n values, n >= 1.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, None)
    t = t_quantile((1 + LEVEL) / 2, len(array) - 1)
    return Interval(mean, t * float(array.std(ddof=1)) / math.sqrt(len(array)))
