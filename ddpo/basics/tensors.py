"""Tensor helpers for latents of any rank: [B, ...] with one row per sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def expand_like(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per row, [B], in a shape that broadcasts against ``like``, [B, 1, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def mean_per_row(values: Tensor) -> Tensor:
    """Return the mean of each row, [B], of a tensor of shape [B, ...]."""
    return values.mean(dim=tuple(range(1, values.ndim)))
