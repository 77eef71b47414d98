"""Activations of the denoising network in the host's memory, from the forward to the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def offloaded(network: nn.Module) -> Iterator[None]:
    """Keep what the backward needs of a forward in the host's memory until then.

    By torch's hooks for saved tensors: the copies are made on the stream that computes, to and from
    pinned memory, so that nothing waits for them but the kernels that need them. Weights stay where
    they are. Gradients do not change.

    Args:
        network: Whose weights and buffers stay.
    """
    resident = {
        each.untyped_storage()._cdata for each in chain(network.parameters(), network.buffers())
    }

    def pack(tensor: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
        if tensor.untyped_storage()._cdata in resident:
            return None, tensor
        device, strides = tensor.device, tensor.stride()

        def back(copy: Tensor) -> Tensor:
            if 0 in strides:  # expanded: several elements are one
                return copy.to(device, non_blocking=True)
            # Of half of a larger tensor, kernels round otherwise than of a dense copy.
            found = torch.empty_strided(copy.shape, strides, dtype=copy.dtype, device=device)
            return found.copy_(copy, non_blocking=True)

        # From a GPU without blocking, torch copies into pinned memory.
        return back, tensor.to("cpu", non_blocking=True, copy=True)

    def unpack(packed: tuple[Callable[[Tensor], Tensor] | None, Tensor]) -> Tensor:
        back, tensor = packed
        return tensor if back is None else back(tensor)

    with saved_tensors_hooks(pack, unpack):
        yield
