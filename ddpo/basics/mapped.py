"""Tensors that are too large for memory, in temporary files that are mapped into it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_logger = logging.getLogger(__name__)


def stack_on_disk(parts: Iterable[Tensor], rows: int) -> Tensor:
    """Stack tensors along their first dimension, in a file that ends with the tensor.

    The kernel drops the file's pages where memory is short, so this needs memory for one part at a
    time. The file is in the folder for temporary files (TMPDIR); if that has no room, the tensor is
    in memory.

    Args:
        parts: Tensors that differ in their first dimension alone, as they are needed.
        rows: Sum of their first dimensions.

    Returns:
        What `torch.cat` returns, on the CPU.
    """
    whole, done = None, 0
    for part in parts:
        if whole is None:
            whole = mapped_tensor((rows, *part.shape[1:]), part.dtype, "an epoch's trajectories")
        whole[done : done + len(part)] = part
        done += len(part)
        del part  # before the next one is made
    if whole is None or done != rows:
        raise ValueError(f"the parts have {done} rows, expected {rows}")
    return whole


def mapped_tensor(shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
    """Return an uninitialised tensor in a file; in memory if there is no room for the file.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        what: What it will hold, for the warning that it is in memory.
    """
    import torch

    count = torch.Size(shape).numel()
    with tempfile.NamedTemporaryFile(prefix="ddpo-") as file:
        try:
            # All of it now: a page that finds no room later would end the process.
            _reserve(file.fileno(), max(count * dtype.itemsize, 1))
        except OSError as error:
            _logger.warning(
                "%s stay in memory: %s has no room for them (%s)",
                what,
                tempfile.gettempdir(),
                error.strerror,
            )
            return torch.empty(shape, dtype=dtype)
        flat = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    return flat.view(shape)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size and its room on the disk.

    Raises:
        OSError: There is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    block = bytes(1 << 20)  # macOS has no such call
    for start in range(0, size, len(block)):
        os.pwrite(descriptor, block[: size - start], start)
