"""Digests: when two values, files or sets of weights count as the same.

All are sha256 in lower-case hex, equal across processes, machines and devices.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """Return the sha256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Serialise a JSON value to the canonical form that digests and commits use.

    Keys sorted, no spaces, UTF-8 unescaped, no trailing newline. Tuples become arrays.

    Args:
        value: A JSON value: None, bool, int, finite float, str, list or tuple, mapping with str
            keys.

    Returns:
        The bytes; `canonical_json(json.loads(b)) == b` for every result b.

    Raises:
        TypeError: The value contains something that is not JSON, or a key that is not a str (which
            `json` would convert, so that the order would depend on its original type).
        ValueError: A float is NaN or infinite, or a str is not valid Unicode.
    """
    _check_keys(value)
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8")


def json_digest(value: Any) -> str:
    """Return the sha256 of a value's `canonical_json`, 64 hex digits."""
    return sha256_bytes(canonical_json(value))


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of named tensors, independent of device, strides and file format.

    For each tensor, in the order of names: name, dtype and shape as canonical JSON, a newline, then
    the elements' bytes in row-major order. The header determines how many bytes follow, so no two
    sets of tensors share a stream.

    Args:
        tensors: Dense tensors of any dtype and shape, by name.

    Returns:
        64 hex digits.
    """
    # torch takes seconds to import, and commands that only list or compare need no tensors.
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        sha.update(canonical_json(header) + b"\n")
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


REMEMBERED_FROM_BYTES = 2**28
"""Of files with fewer bytes together, the digest is computed each time."""


def files_digest(files: Sequence[tuple[str, Path]]) -> str:
    """Return the digest of named files, wherever they are.

    That of large files is remembered in a cache beside the Hugging Face Hub's while none of them
    changes its size, time or place.

    Args:
        files: The name of each, and where it is.

    Returns:
        64 hex digits, over names, sizes and contents.

    Raises:
        OSError: A file cannot be read.
    """
    states = [(str(file), file.stat()) for _, file in files]
    if sum(state.st_size for _, state in states) < REMEMBERED_FROM_BYTES:
        return _digested(files)
    from huggingface_hub import constants

    known = json_digest([[name, s.st_size, s.st_mtime_ns, s.st_ino] for name, s in states])
    note = Path(constants.HF_HOME) / "ddpo" / "digests" / known
    with suppress(OSError):
        if len(text := note.read_text()) == hashlib.sha256().digest_size * 2:
            return text
    digest = _digested(files)
    with suppress(OSError):  # a cache that cannot be written costs time only
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as file:
            file.write(digest)
        Path(file.name).replace(note)
    return digest


def _digested(files: Sequence[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _check_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"JSON key {key!r} is a {type(key).__name__}, expected a str")
            _check_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item)
