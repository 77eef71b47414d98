"""What a GPU's kernels do that `meta` does not know: fused attention, and arithmetic in 16 bits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

_NARROW = frozenset(
    {
        "linear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "addbmm",
        "einsum",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "scaled_dot_product_attention",
    }
)
"""What autocast computes in 16 bits on CUDA, of what networks call."""
_WIDE = frozenset(
    {
        "layer_norm",
        "group_norm",
        "rms_norm",
        "softmax",
        "log_softmax",
        "pow",
        "__pow__",
        "__rpow__",
        "exp",
        "log",
        "rsqrt",
        "reciprocal",
        "sum",
        "prod",
        "cumsum",
        "norm",
        "mse_loss",
        "softplus",
    }
)
"""What it computes in float32."""


class GpuKernels(TorchFunctionMode):
    """Runs code on `meta` as a GPU would.

    Attention is one kernel that keeps what its backward needs, where `meta` would materialise the
    matrix of all pairs of tokens. Inside ``torch.autocast("cpu")``, whose state is the only one
    that gradient checkpointing restores there, operations on `meta` are cast as on CUDA.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            wanted = dtype if name in _NARROW else torch.float32 if name in _WIDE else None
            if wanted is not None:
                args, kwargs = tree_map(lambda each: self._as(each, wanted), (args, kwargs))
        elif self._cast:
            self._cast.clear()
        if name == "scaled_dot_product_attention":
            heads = [*args, *(kwargs[each] for each in ("query", "key", "value") if each in kwargs)]
            if heads[0].is_meta:
                return _Attention.apply(*heads[:3])
        return func(*args, **kwargs)

    def _as(self, value: Any, dtype: torch.dtype) -> Any:
        """Cast a tensor of the device; a weight once in each block of autocast."""
        floats = (torch.float32, torch.bfloat16, torch.float16)
        if not isinstance(value, Tensor) or not value.is_meta or value.dtype not in floats:
            return value
        if value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._cast:
            self._cast[id(value)] = (value, value.to(dtype))
        return self._cast[id(value)][1]


def checkpointed(module: Any, *args: Any) -> Any:
    """Run a module, recomputing it in the backward, as diffusers does, by the same kernels.

    Inside a backward, modes of functions are off.
    """
    return checkpoint(
        module.__call__,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), GpuKernels()),
    )


class _Attention(torch.autograd.Function):
    """Attention as its fused kernels keep it: inputs, output, and a number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
