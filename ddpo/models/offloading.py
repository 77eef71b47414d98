"""Activations of the denoising network in the host's memory, from the forward to the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def offload_activations(network: nn.Module) -> None:
    """Let a network's forwards with gradients offload what their backward needs, in place.

    Args:
        network: With its adapter.
    """
    forward = network.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with offloaded(network):
            return forward(*args, **kwargs)

    network.forward = run


@contextmanager
def offloaded(network: nn.Module) -> Iterator[None]:
    """Keep what the backward needs of a forward in the host's memory until then.

    By torch's hooks for saved tensors, in pinned memory. The copies run on the stream that
    computes, in order with its kernels; the host waits for none of them. Weights stay where they
    are, but not the narrower copies of them that autocast makes in full fine-tuning. Gradients do
    not change.

    Args:
        network: Whose weights and buffers stay.
    """
    resident = {
        each.untyped_storage()._cdata for each in chain(network.parameters(), network.buffers())
    }

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        if tensor.untyped_storage()._cdata in resident:
            return _kept(tensor)
        return _copied(tensor)

    with saved_tensors_hooks(pack, lambda unpack: unpack()):
        yield


def _kept(tensor: Tensor) -> Callable[[], Tensor]:
    version = tensor._version

    def unpack() -> Tensor:
        # Hooks go around torch's own check.
        if tensor._version != version:
            raise RuntimeError("a weight was changed in place between a forward and its backward")
        return tensor

    return unpack


def _copied(tensor: Tensor) -> Callable[[], Tensor]:
    device, strides = tensor.device, tensor.stride()
    # From a GPU without blocking, torch copies into pinned memory.
    copy = tensor.to("cpu", non_blocking=True, copy=True)

    def unpack() -> Tensor:
        if 0 in strides:  # expanded: several elements are one
            return copy.to(device, non_blocking=True)
        # Of half of a larger tensor, kernels round otherwise than of a dense copy.
        found = torch.empty_strided(copy.shape, strides, dtype=copy.dtype, device=device)
        return found.copy_(copy, non_blocking=True)

    return unpack
