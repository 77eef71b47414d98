"""Tensors as safetensors bytes, the same bytes in every process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import JsonValue
from safetensors import SafetensorError

from ddpo.basics.digests import canonical_json
from ddpo.errors import UnreadableData

if TYPE_CHECKING:
    import torch

HEADER_LIMIT_BYTES = 16 * 2**20
TENSOR_LIMIT = 100_000
"""Full fine-tuning of Stable Diffusion has 686 tensors, about 2,800 with the optimizer."""

METADATA_KEY = "ddpo"
"""The one metadata key: with several, the order in the header differs from process to process."""


def encode_tensors(tensors: Mapping[str, torch.Tensor], metadata: JsonValue | None = None) -> bytes:
    """Return named tensors as a safetensors file; equal inputs give equal bytes.

    Args:
        tensors: Dense tensors of any shape, dtype and device.
        metadata: A JSON value to store in the header.
    """
    from safetensors.torch import save  # here: commands that only list need no torch

    plain: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, which views of one batch do.
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    header = None if metadata is None else {METADATA_KEY: canonical_json(metadata).decode()}
    return save(plain, metadata=header)


def decode_tensors(data: bytes) -> tuple[dict[str, torch.Tensor], JsonValue]:
    """Return the tensors of a safetensors file, on the CPU and by name, and its metadata.

    The metadata is what `encode_tensors` was given, None if nothing.

    Raises:
        UnreadableData: The bytes are not a safetensors file.
    """
    from safetensors.torch import load

    try:
        header_size = int.from_bytes(data[:8], "little")
        if header_size > HEADER_LIMIT_BYTES:
            raise ValueError(f"its header claims {header_size} bytes, {HEADER_LIMIT_BYTES} at most")
        header = json.loads(data[8 : 8 + header_size])
        if len(header) > TENSOR_LIMIT:
            raise ValueError(f"it lists {len(header)} tensors, {TENSOR_LIMIT} at most")
        tensors = load(data)
        text = header.get("__metadata__", {}).get(METADATA_KEY)
        return tensors, None if text is None else json.loads(text)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UnreadableData("a safetensors file", str(error)) from error
