"""From a config's `model` to a folder of files and its digest, whatever the family.

A family's *parts* are the subfolders of the pipeline that it loads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from ddpo.basics.paths import expand
from ddpo.config import ModelConfig
from ddpo.errors import ModelError
from ddpo.starter import STARTER_PATH

INDEX = "model_index.json"
"""The file that names a pipeline's class and parts."""

# Other files of the same folders that are not loaded: pickles, other frameworks', other variants'.
_UNWANTED = ["*.bin", "*.msgpack", "*.h5", "*.ckpt", "*.fp16.*", "*.non_ema.*", "*.onnx*"]


def pipeline_class(config: ModelConfig) -> str:
    """Return the class of a model's pipeline, which tells its family, without loading the model.

    Args:
        config: Path or Hub id.

    Raises:
        ModelError: The model is neither on disk nor reachable, or is not a diffusers pipeline.
    """
    index = _model_index(config)
    try:
        return str(json.loads(index.read_bytes())["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{index} does not name a pipeline class (_class_name); expected a diffusers pipeline "
            "as save_pretrained writes it"
        ) from error


def fetch_model(config: ModelConfig, parts: Sequence[str]) -> Path:
    """Return the folder of a model's files, downloading them from the Hub if needed.

    Args:
        config: Path or Hub id.
        parts: The family's.

    Returns:
        A folder as ``save_pretrained`` writes it.

    Raises:
        ModelError: The model is neither on disk nor reachable.
    """
    folder = _model_index(config).parent
    if _local_folder(config) is not None:
        return folder
    return Path(
        snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=[INDEX, *(f"{part}/*" for part in parts)],
            ignore_patterns=_UNWANTED,
        )
    )


def base_files(folder: Path, parts: Sequence[str]) -> list[Path]:
    """Return the files that make up a base model: configs, tokenizer, safetensors.

    Args:
        folder: A pipeline's folder.
        parts: The family's.
    """
    files = [folder / INDEX]
    for part in parts:
        files += sorted(p for p in (folder / part).glob("*") if _is_loaded(p))
    return files


def base_digest(folder: Path, parts: Sequence[str]) -> str:
    """Digest the files that make up a base model.

    Args:
        folder: A pipeline's folder.
        parts: The family's.

    Returns:
        sha256 over names and contents, whatever the folder is called.
    """
    digest = hashlib.sha256()
    for file in base_files(folder, parts):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _model_index(config: ModelConfig) -> Path:
    folder = _local_folder(config)
    if folder is not None:
        if not (folder / INDEX).is_file():
            raise ModelError(
                f"model.path {config.path!r} is a folder without {INDEX}; expected a diffusers "
                "pipeline as save_pretrained writes it"
            )
        return folder / INDEX
    try:
        return Path(hf_hub_download(config.path, INDEX, revision=config.revision))
    except HFValidationError as error:
        raise ModelError(
            f"model.path {config.path!r} is neither a folder here nor a Hub id; expected "
            f"`starter`, a folder that contains {INDEX}, or `owner/name`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {config.path!r} is neither on disk nor in the Hub's cache, and the Hub is "
            "unreachable. Check the spelling and the network, or set model.path to a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"Hub model {config.path!r} has no {INDEX}; expected a diffusers pipeline"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"cannot download {config.path!r} (revision {config.revision or 'main'}) from the Hub: "
            f"{str(error).splitlines()[0]}. Check the spelling, and log in with `hf auth login` if "
            "the model is gated."
        ) from error


def _local_folder(config: ModelConfig) -> Path | None:
    if config.path == "starter":
        return STARTER_PATH
    folder = Path(expand(config.path))
    return folder.absolute() if folder.is_dir() else None


def _is_loaded(path: Path) -> bool:
    return path.is_file() and not any(path.match(pattern) for pattern in _UNWANTED)
