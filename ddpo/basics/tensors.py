"""Helpers for latents of any rank, [B, ...] with one row per sample; and for loaded weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def expand_like(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per row, [B], in a shape that broadcasts against ``like``, [B, 1, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def mean_per_row(values: Tensor) -> Tensor:
    """Return the mean of each row, [B], of a tensor of shape [B, ...]."""
    return values.mean(dim=tuple(range(1, values.ndim)))


def detach_from_files(module: nn.Module) -> None:
    """Copy a module's tensors on the CPU into memory of their own, in place.

    Loaded weights may be views of their files, and would then follow whatever is written there.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
