"""Tensors as safetensors files, the same bytes in every process."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue
from safetensors import SafetensorError

from ddpo.basics.digests import canonical_json
from ddpo.errors import UnreadableData

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

HEADER_LIMIT_BYTES = 16 * 2**20
TENSOR_LIMIT = 100_000
"""Full fine-tuning of Stable Diffusion has 686 tensors, about 2,800 with the optimizer."""

HASHED_BYTES = 256 * 2**10
"""How much of a tensor is copied and hashed at once."""

METADATA_KEY = "ddpo"
"""The one metadata key: with several, the order in the header differs from process to process."""

_DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Torch's names of safetensors' dtypes, in the order in which a file has the tensors."""


def write_tensors(
    tensors: Mapping[str, torch.Tensor], file: Path, metadata: JsonValue | None = None
) -> Future[str] | None:
    """Write named tensors to a safetensors file; equal inputs give equal bytes.

    Args:
        tensors: Dense tensors of any shape, dtype and device. Those on the CPU are not copied,
            unless they are strided or share memory.
        file: An existing file, which is replaced.
        metadata: A JSON value to store in the header.

    Returns:
        The file's SHA-256, which a thread computes from the tensors meanwhile and a little longer:
        they must not change before. None if only the file can tell it.

    Raises:
        OSError: The file cannot be written.
    """
    from safetensors.torch import save_file  # here: commands that only list need no torch

    plain: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, which views of one batch do.
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    header = None if metadata is None else {METADATA_KEY: canonical_json(metadata).decode()}
    mode = file.stat().st_mode
    beginning, ordered = _beginning(plain, header)
    beside = ThreadPoolExecutor(1)
    digest = beside.submit(_digest, beginning, ordered)
    beside.shutdown(wait=False)
    try:
        save_file(plain, file, metadata=header)
    except SafetensorError as error:
        # It tells the system's errors as text.
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise
    file.chmod(mode)  # it renames a file of its own, which only its owner can read
    with file.open("rb") as opened:
        return digest if opened.read(len(beginning)) == beginning else None


def _beginning(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[torch.Tensor]]:
    """Return a file's header, as safetensors writes it, and the tensors in the file's order.

    Another version of safetensors may write another one, as it does for dtypes not in `_DTYPES`.
    """
    dtypes = {f"torch.{ours}": theirs for theirs, ours in _DTYPES.items()}
    order = {dtype: rank for rank, dtype in enumerate(dtypes)}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    names = sorted(tensors, key=lambda name: (order.get(str(tensors[name].dtype), -1), name))
    start = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": dtypes.get(str(tensor.dtype)),
            "shape": list(tensor.shape),
            "data_offsets": [start, start := start + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensors[name] for name in names]


def _digest(beginning: bytes, tensors: Sequence[torch.Tensor]) -> str:
    """Return the SHA-256 of a file that begins so and goes on with the tensors."""
    import torch

    digest = hashlib.sha256(beginning)
    for tensor in tensors:
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), HASHED_BYTES):
            # A copy, in the processor's cache: with it, this takes less time than without.
            digest.update(bytes(data[start : start + HASHED_BYTES]))
    return digest.hexdigest()


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], JsonValue]:
    """Return the tensors of a safetensors file, on the CPU and by name, and its metadata.

    The tensors are mapped into memory: the kernel reads what is used, and drops it again where
    memory is short. Changing one does not change the file.
    The metadata is what `write_tensors` was given, None if nothing.

    Raises:
        UnreadableData: It is not a safetensors file.
    """
    from safetensors.torch import load_file

    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(_header_size(opened.read(8))))
        if len(header) > TENSOR_LIMIT:
            raise ValueError(f"it lists {len(header)} tensors, {TENSOR_LIMIT} at most")
        tensors = load_file(file)
        text = header.get("__metadata__", {}).get(METADATA_KEY)
        return tensors, None if text is None else json.loads(text)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UnreadableData("a safetensors file", str(error)) from error


def tensors_in(data: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file in memory, on the CPU and by name.

    They are views: each of them keeps all of the memory.

    Args:
        data: The file's bytes, as `write_tensors` wrote them.

    Raises:
        UnreadableData: It is not a safetensors file.
    """
    import torch

    try:
        start = 8 + _header_size(data[:8].tobytes())
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        whole, tensors = torch.from_numpy(data[start:]), {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            dtype = getattr(torch, _DTYPES[entry["dtype"]])
            tensors[name] = whole[first:end].view(dtype).view(entry["shape"])
        return tensors
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnreadableData("a safetensors file", str(error)) from error


def _header_size(first: bytes) -> int:
    """Return the size of a file's header in bytes.

    Args:
        first: The file's first eight bytes.
    """
    size = int.from_bytes(first, "little")
    if size > HEADER_LIMIT_BYTES:
        raise ValueError(f"its header claims {size} bytes, {HEADER_LIMIT_BYTES} at most")
    return size
