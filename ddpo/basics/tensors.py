"""Helpers for latents of any rank, [B, ...] with one row per sample; and for loaded weights."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.tensor import DTensor


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


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes; all of them have to ask for it.

    Args:
        tensor: Split over processes; any other one is returned as it is.
    """
    return tensor.full_tensor() if is_split(tensor) else tensor


def held_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor as another one of the same shape is held.

    Args:
        tensor: Whole, and the same in all processes; or already held so.
        other: Gives the device and, if it is split, the part that this process keeps.
    """
    if is_split(other) and not is_split(tensor):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(
            tensor.detach(), other.device_mesh, other.placements, src_data_rank=None
        )
    return tensor.detach().to(other.device)


def is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is split over processes."""
    # Where nothing is split, the module is not there yet, and importing it takes long.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
