"""Trained weights as files for other programs, and a check that diffusers reads them as written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddpo.errors import ModelError
from ddpo.models import hub
from ddpo.models.files import INDEX

_SHARD_INDEX = ".safetensors.index.json"


def save_tensors(
    tensors: Mapping[str, Tensor], file: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, equal bytes for equal inputs.

    It has the permissions of any new file: safetensors' own are 0600.

    Args:
        tensors: By name; contiguous, on the CPU.
        file: Created or replaced.
        metadata: For the file's header.
    """
    file = Path(file)
    file.unlink(missing_ok=True)
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, metadata=dict(metadata or {"format": "pt"}))
    _sort_metadata(file)
    file.chmod(mode)


def write_pipeline(
    folder: Path, base: Path, parts: Sequence[str], trained: str, state: Mapping[str, Tensor]
) -> None:
    """Write a base model with one of its parts trained.

    Every other file is a copy of the base model's. The trained part keeps the base model's file
    names and shards, but is stored in float32: 16 bits would round away what small steps changed.
    Weights of a variant lose its name, so that they are found without it.

    Args:
        folder: Created if missing.
        base: The base model's folder.
        parts: The family's; the pipeline is exported without any others.
        trained: The part that was trained.
        state: The trained part's weights.
    """
    files = hub.local_files(base, parts)
    for name in files.loaded():
        file, target = base / name, folder / files.without_variant(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.parent.name == trained and file.suffix == ".safetensors":
            _write_trained(target, file, state)
        elif target.name.endswith(_SHARD_INDEX):
            target.write_text(files.without_variant(file.read_text("utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(file, target)
    for index in (folder / trained).glob(f"*{_SHARD_INDEX}"):
        _update_size(index, state)
    _name_only(folder / INDEX, parts)


def check_read_back(what: str, found: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> None:
    """Check that a reader found what was written.

    Args:
        what: What was exported, for the message.
        found: What the reader made of the files.
        written: What the files are meant to hold.

    Raises:
        ModelError: A tensor is missing, changed or unexpected.
    """
    same = sum(
        name in found and torch.equal(found[name].cpu(), value.cpu())
        for name, value in written.items()
    )
    if same < len(written) or len(found) > len(written):
        raise ModelError(
            f"diffusers {diffusers.__version__} read back {same} of {len(written)} tensors of the "
            f"exported {what} as they were written, and {len(found.keys() - written.keys())} "
            "others, so the export was discarded. Install the versions that constraints.txt pins, "
            "and resume the run: its checkpoints are kept"
        )


def _sort_metadata(file: Path) -> None:
    """Sort a header's metadata, in place: safetensors writes several keys in a random order."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        stream.seek(8)
        stream.write(content.ljust(size))


def _write_trained(target: Path, file: Path, state: Mapping[str, Tensor]) -> None:
    with safe_open(file, "pt") as stored:
        names, metadata = list(stored.keys()), stored.metadata()
    tensors = {name: state[name].float().cpu().contiguous() for name in names if name in state}
    save_tensors(tensors, target, metadata)


def _update_size(index: Path, state: Mapping[str, Tensor]) -> None:
    content = json.loads(index.read_bytes())
    content["metadata"]["total_size"] = sum(4 * value.numel() for value in state.values())
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _name_only(index: Path, parts: Sequence[str]) -> None:
    """Let an index name no part but these, and leave it as it is if it does not."""
    content = json.loads(index.read_bytes())
    others = [
        name
        for name, value in content.items()
        if isinstance(value, list) and name not in parts and value != [None, None]
    ]
    if others:
        content |= {name: [None, None] for name in others}
        content |= {"requires_safety_checker": False}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
