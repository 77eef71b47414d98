"""A model in a single ``.safetensors`` file: converted once to a pipeline's folder, then kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from ddpo.basics.digests import json_digest
from ddpo.errors import ModelError
from ddpo.models.files import INDEX


def converted(file: Path) -> Path:
    """Return the folder of a single file's pipeline, in a cache beside the Hub's.

    diffusers knows the model's kind by its tensors, and takes configs and tokenizer of that kind
    from the Hub.

    Args:
        file: Absolute.

    Raises:
        ModelError: The file is no ``.safetensors``, or diffusers cannot load it.
    """
    if file.suffix != ".safetensors":
        raise ModelError(
            f"model.path {str(file)!r} is a file; expected a folder that contains {INDEX}, or a "
            f"single .safetensors file. {_way_out(file)}"
        )
    found = file.stat()
    name = json_digest([str(file), found.st_size, found.st_mtime_ns])[:16]
    folder = Path(constants.HF_HOME) / "ddpo" / f"{file.stem}-{name}"
    if not folder.is_dir():
        _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import diffusers

    name = _pipeline_class(file)
    # Of a checker that blackens images, which Stable Diffusion XL has none of.
    without = {"safety_checker": None} if name == "StableDiffusionPipeline" else {}
    try:
        pipeline = getattr(diffusers, name).from_single_file(str(file), **without)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model.path {str(file)!r} is a single file that diffusers cannot load here "
            f"({reason}). It needs the configs of the model's kind from the Hub, once. "
            f"{_way_out(file)}"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "pipeline"
        pipeline.save_pretrained(whole, safe_serialization=True)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has just converted it
                raise


def _pipeline_class(file: Path) -> str:
    """Return the class of a single file's pipeline: XL has a second text encoder."""
    try:
        with safe_open(file, "np") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError):
        names = []  # the message comes from loading it
    xl = any(name.startswith("conditioner.embedders.1.") for name in names)
    return "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"


def _way_out(file: Path) -> str:
    return (
        "To convert it where it can be loaded: "
        f'python -c "from diffusers import {_pipeline_class(file)} as P; '
        f"P.from_single_file('{file}').save_pretrained('NEW_FOLDER')\", "
        "then set model.path to the new folder"
    )
