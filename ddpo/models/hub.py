"""From a config's `model` to a folder of files and its digest, whatever the family.

A family's *parts* are the subfolders of the pipeline that it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from ddpo.basics.digests import files_digest
from ddpo.basics.paths import expand
from ddpo.config import ModelConfig
from ddpo.errors import ModelError
from ddpo.models.files import INDEX, ModelFiles
from ddpo.models.single_file import converted
from ddpo.starter import FLOW_STARTER_PATH, STARTER_PATH

STARTERS: Mapping[str, Path] = {"starter": STARTER_PATH, "starter_flow": FLOW_STARTER_PATH}
"""The models that ship with the package, by the path that a config gives them."""

REMEMBERED_FROM_BYTES = 2**28
"""Reading a smaller model takes less than a second."""

VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
"""An autoencoder by itself."""


def on_hub(config: ModelConfig) -> bool:
    """Return whether a model is the Hub's: neither a starter, nor a folder or a file here."""
    return config.path not in STARTERS and not Path(expand(config.path)).exists()


def find_model(config: ModelConfig, parts: Sequence[str] = ()) -> ModelFiles:
    """Return a model's files without downloading weights: of the Hub's, only the small JSON files.

    Args:
        config: Path or Hub id.
        parts: The family's.

    Raises:
        ModelError: The model is neither on disk nor reachable.
    """
    folder = _model_index(config).parent
    names = frozenset[str]()
    if _local_folder(config) is None:
        names = _hub_names(config, folder)
        if parts:
            _download(config, folder, [f"{part}/*.json" for part in parts])
    return ModelFiles(config.path, folder, names or _names(folder), parts)


def fetch_model(config: ModelConfig, parts: Sequence[str]) -> ModelFiles:
    """Return a model's files, downloading from the Hub those that are loaded and not here.

    Args:
        config: Path or Hub id.
        parts: The family's.

    Raises:
        ModelError: The model is neither on disk nor reachable, or a part has no safetensors.
    """
    files = find_model(config, parts)
    loaded = files.loaded()
    if _local_folder(config) is None:
        _download(config, files.folder, loaded)
    return files


def local_files(folder: Path, parts: Sequence[str]) -> ModelFiles:
    """Return the files of a pipeline's folder.

    Args:
        folder: The folder.
        parts: The family's.
    """
    return ModelFiles(str(folder), folder, _names(folder), parts)


def fetch_vae(config: ModelConfig, names: Sequence[str] = VAE_FILES) -> Path | None:
    """Return the folder of another autoencoder than the model's own, downloading it if needed.

    Args:
        config: Its path or Hub id, if it names one.
        names: The files that are needed.

    Raises:
        ModelError: It is neither on disk nor reachable, or no autoencoder.
    """
    if config.vae is None:
        return None
    folder = Path(expand(config.vae)).absolute()
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    config.vae, revision=config.vae_revision, allow_patterns=list(names)
                )
            )
        except (HFValidationError, HTTPError, OSError) as error:
            raise ModelError(
                f"model.vae {config.vae!r} is neither a folder here nor downloadable from the Hub: "
                f"{str(error).splitlines()[0]}"
            ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"model.vae {config.vae!r} has no {missing[0]}; expected an autoencoder as "
            "AutoencoderKL.save_pretrained writes it"
        )
    return folder


def file_states(
    folder: Path, parts: Sequence[str], vae: Path | None = None
) -> dict[Path, tuple[int, int, int]]:
    """Return number, size in bytes and time of the last change, in ns, of each file that is loaded.

    Raises:
        ModelError: A file cannot be read.
    """
    try:
        files = [folder / name for name in local_files(folder, parts).loaded()]
        files += [vae / name for name in VAE_FILES] if vae else []
        found = ((file, file.stat()) for file in files)
        return {file: (s.st_ino, s.st_size, s.st_mtime_ns) for file, s in found}
    except OSError as error:
        raise ModelError(f"cannot read the model in {folder}: {error}") from error


def base_digest(folder: Path, parts: Sequence[str], vae: Path | None = None) -> str:
    """Digest the files that make up a base model.

    Args:
        folder: A pipeline's folder.
        parts: Those that are loaded.
        vae: Folder of another autoencoder.

    Returns:
        sha256 over names and contents, whatever the folder is called. That of a large model is
        remembered in a cache beside the Hub's while no file changes its size, time or place.
    """
    files = [(name, folder / name) for name in local_files(folder, parts).loaded()]
    files += [(f"model.vae/{name}", vae / name) for name in VAE_FILES] if vae else []
    return files_digest(files)


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
            f"`starter`, `starter_flow`, a folder that contains {INDEX}, or `owner/name`"
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
    except (HTTPError, OSError) as error:
        raise _cannot_download(config, error) from error


def _local_folder(config: ModelConfig) -> Path | None:
    if config.path in STARTERS:
        return STARTERS[config.path]
    path = Path(expand(config.path)).absolute()
    if path.is_file():
        return converted(path)
    return path if path.is_dir() else None


def _names(folder: Path) -> frozenset[str]:
    """Return the names of a local folder's files and of those in its subfolders."""
    files = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return frozenset(path.relative_to(folder).as_posix() for path in files)


def _hub_names(config: ModelConfig, snapshot: Path) -> frozenset[str]:
    """Return the names of a Hub model's files; none where the Hub cannot be asked."""
    try:
        # A snapshot is named after its commit: a branch may have moved since it was looked up.
        return frozenset(HfApi().list_repo_files(config.path, revision=snapshot.name))
    except (HTTPError, OSError):
        return frozenset()


def _download(config: ModelConfig, snapshot: Path, patterns: Sequence[str]) -> None:
    """Download what is missing from the Hub's cache; offline, do with what is there."""
    try:
        snapshot_download(config.path, revision=snapshot.name, allow_patterns=list(patterns))
    except (HTTPError, OSError) as error:
        raise _cannot_download(config, error) from error


def _cannot_download(config: ModelConfig, error: Exception) -> ModelError:
    return ModelError(
        f"cannot download {config.path!r} (revision {config.revision or 'main'}) from the Hub: "
        f"{str(error).splitlines()[0]}. Check the spelling, and log in with `hf auth login` if "
        "the model is gated."
    )
