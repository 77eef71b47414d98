"""Importance ratios of an epoch, as they are shown. Shapes: S samples, T denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RatioDeviation:
    """How far importance ratios were from 1 before any update, at one timestep or over all."""

    mean: float
    """Mean of |rho - 1|."""
    p99: float
    """Its 99th percentile."""
    max: float
    """Its maximum."""

    @classmethod
    def of(cls, new: Tensor, stored: Tensor) -> RatioDeviation:
        """Compare log-probs with the sampler's; NaN entries of ``new`` are left out."""
        deviation = (torch.exp(new - stored) - 1).abs().flatten().double()
        deviation = deviation[~torch.isnan(deviation)]
        return cls(float(deviation.mean()), float(deviation.quantile(0.99)), float(deviation.max()))


def ratio_metrics(new: Tensor, old: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Measure the importance ratios of an epoch.

    Args:
        new: [S, T], log-probs as each pair's update computed them.
        old: [S, T], the ratio's denominator.

    Returns:
        The ratios, [S, T] float64; and by name their mean, percentiles and extremes, and
        ``approx_kl``, the mean of (log p_new - log p_old)² / 2
        (http://joschu.net/blog/kl-approx.html).
    """
    difference = (new - old).double()
    ratio = difference.exp()
    return ratio, {
        "approx_kl": float((difference**2).mean() / 2),
        "ratio_mean": float(ratio.mean()),
        "ratio_p05": float(np.quantile(ratio.cpu().numpy(), 0.05)),
        "ratio_p95": float(np.quantile(ratio.cpu().numpy(), 0.95)),
        "ratio_min": float(ratio.min()),
        "ratio_max": float(ratio.max()),
    }
