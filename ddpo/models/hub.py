"""From a config's `model` to a folder of weights, its digest and a diffusers pipeline."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from ddpo.config import ModelConfig
from ddpo.errors import ModelError
from ddpo.starter import STARTER_PATH

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_WANTED = ["model_index.json", *(f"{part}/*" for part in _PARTS)]
# Other files of the same folders that are not loaded: pickles, other frameworks', other variants'.
_UNWANTED = ["*.bin", "*.msgpack", "*.h5", "*.ckpt", "*.fp16.*", "*.non_ema.*", "*.onnx*"]


def check_model(config: ModelConfig) -> None:
    """Check that a model can be had, without loading it.

    Args:
        config: Path or hub id.

    Raises:
        ModelError: Neither on disk nor reachable.
    """
    folder = _local_folder(config)
    if folder is not None:
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"model.path {config.path!r} is a folder without model_index.json; expected a "
                "diffusers pipeline as save_pretrained writes it"
            )
        return
    try:
        hf_hub_download(config.path, "model_index.json", revision=config.revision)
    except HFValidationError as error:
        raise ModelError(
            f"model.path {config.path!r} is no folder here and no hub id; expected `starter`, a "
            "folder that holds model_index.json, or `owner/name`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {config.path!r} is neither on disk nor in the hub's cache, and the hub cannot "
            "be reached. Check the spelling and the network, or set model.path to a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"hub model {config.path!r} holds no model_index.json; expected a diffusers pipeline"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"hub model {config.path!r} (revision {config.revision or 'main'}) cannot be had: "
            f"{str(error).splitlines()[0]}. Check the spelling, and log in with "
            "`hf auth login` if it is gated."
        ) from error


def fetch_model(config: ModelConfig) -> Path:
    """Return the folder of a model's files, fetching them from the hub where needed.

    Args:
        config: Path or hub id.

    Returns:
        A folder as ``save_pretrained`` writes it.

    Raises:
        ModelError: Neither on disk nor reachable.
    """
    check_model(config)
    folder = _local_folder(config)
    if folder is not None:
        return folder
    return Path(
        snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    )


def base_digest(folder: Path) -> str:
    """Digest the files that make a base model: configs, tokenizer, safetensors.

    Args:
        folder: A pipeline's folder.

    Returns:
        sha256 over names and contents; where the folder lies does not matter.
    """
    digest = hashlib.sha256()
    files = [folder / "model_index.json"]
    for part in _PARTS:
        files += sorted(p for p in (folder / part).glob("*") if _is_loaded(p))
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load a Stable Diffusion 1.x/2.x style pipeline in float32, with a DDIM scheduler.

    Safetensors only, no remote code; the safety checker is left out, since a black picture in place
    of a sample would be scored as the model's own.

    Args:
        folder: A pipeline's folder.

    Returns:
        The pipeline, on the CPU, in eval mode and without gradients.

    Raises:
        ModelError: The folder does not hold such a pipeline.
    """
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{folder} cannot be loaded as a StableDiffusionPipeline: {error}. Expected Stable "
            "Diffusion 1.x or 2.x (or the starter) in safetensors."
        ) from error
    pipeline.to(dtype=torch.float32)  # whatever the files are stored in
    settings = pipeline.scheduler.config
    # Other schedulers have no such setting, and DDIM's own default of true is for pixel models.
    clip_sample = settings.get("clip_sample", False)
    pipeline.scheduler = DDIMScheduler.from_config(settings, clip_sample=clip_sample)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    return pipeline


def _local_folder(config: ModelConfig) -> Path | None:
    if config.path == "starter":
        return STARTER_PATH
    folder = Path(config.path).expanduser()
    return folder.absolute() if folder.is_dir() else None


def _is_loaded(path: Path) -> bool:
    return path.is_file() and not any(path.match(pattern) for pattern in _UNWANTED)
