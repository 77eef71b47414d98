"""How many bytes tensors take, counted while code runs: on real devices, and on `meta`.

On `meta`, operations return shapes and no numbers, so a network of any size runs in no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
_COPIES = frozenset({_ATEN._to_copy.default, _ATEN.copy_.default})
"""Operations that take tensors of two devices."""
_INDEXING = frozenset(
    {
        _ATEN.index.Tensor,
        _ATEN.index_put.default,
        _ATEN.index_put_.default,
        _ATEN._index_put_impl_.default,
        _ATEN._unsafe_index.Tensor,
    }
)
"""Operations whose second argument may be on the CPU, whatever they index."""

Phase = Literal["encode", "sample", "decode", "update"]
"""The parts of an epoch: prompts to embeddings, noise to latents, latents to images, training."""


class WrongDevice(RuntimeError):
    """An operation got tensors of different devices, which fails on a GPU."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live, of all devices together, and their peak.

    What a kernel needs while it runs, and what an allocator keeps, is not counted.

    On `meta`, it refuses operations that mix devices, which `meta` itself lets pass; and numbers
    that are read have the values of a run in good health: flags are true, numbers 0.

    Args:
        devices: The kinds of device that count, such as ``{"meta"}``; all of them by default.
    """

    def __init__(self, devices: Iterable[str] | None = None) -> None:
        super().__init__()
        self._devices = None if devices is None else frozenset(devices)
        self._sizes: dict[int, int] = {}
        self.current = 0
        """Bytes that live."""
        self.peak = 0
        """The most that have lived at once since the last `restart`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it returns."""
        kwargs = kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(each.is_meta for each in inputs):
            _check_devices(func, args, kwargs)
            if func is _ATEN._local_scalar_dense.default:
                return _value(inputs[0].dtype)
            if func is _ATEN._to_copy.default and _leaves_meta(kwargs):
                return self._on_host(inputs[0], kwargs)
        result = func(*args, **kwargs)
        self.count(tree_leaves(result))
        return result

    def count(self, tensors: Iterable[Any]) -> None:
        """Count the storages of tensors, once each, for as long as they live.

        Args:
            tensors: What is not a tensor is passed over.
        """
        for each in tensors:
            if isinstance(each, Tensor) and self._counts(each.device):
                storage = each.untyped_storage()
                self._add(storage, storage.nbytes())

    def pass_over(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of tensors, such as operations that return views find them."""
        for each in tensors:
            storage = each.untyped_storage()
            self._add(storage, 0)

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count some more bytes inside the block."""
        self._grow(size)
        try:
            yield
        finally:
            self.current -= size

    def restart(self) -> None:
        """Begin to look for another peak."""
        self.peak = self.current

    def _counts(self, device: torch.device) -> bool:
        return self._devices is None or device.type in self._devices

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size
            weakref.finalize(storage, self._forget, key)
            self._grow(size)

    def _grow(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key)

    def _on_host(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return a copy on the CPU that counts as whole and takes no room."""
        dtype = kwargs.get("dtype") or source.dtype
        copy = torch.full((), _value(source.dtype), dtype=dtype).expand(source.shape)
        if self._counts(copy.device):
            self._add(copy.untyped_storage(), copy.numel() * copy.element_size())
        return copy


@dataclass
class Peaks:
    """The peak of each phase; a phase inside another one counts for itself."""

    counter: LiveBytes
    found: dict[Phase, int] = field(default_factory=dict)
    """Bytes by phase."""
    _open: list[Phase] = field(default_factory=list)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count what runs inside the block as a phase."""
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def _note(self) -> None:
        if self._open:
            name = self._open[-1]
            self.found[name] = max(self.found.get(name, 0), self.counter.peak)
        self.counter.restart()


def _value(dtype: torch.dtype) -> bool | int:
    """Return what is read of a tensor on `meta`."""
    return dtype == torch.bool


def _leaves_meta(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != "meta"


def _check_devices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if func in _COPIES:
        return
    checked = (args[0], args[2:]) if func in _INDEXING else (args, kwargs)
    inputs = [each for each in tree_leaves(checked) if isinstance(each, Tensor)]
    stray = [each for each in inputs if not each.is_meta and each.ndim]
    if stray:
        shapes = ", ".join(str(tuple(each.shape)) for each in stray)
        raise WrongDevice(
            f"{func} got tensors on the device and, of shape {shapes}, on {stray[0].device}"
        )
