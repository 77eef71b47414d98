"""Models and weights that rewards name: pinned when a reward is built, fetched when it scores.

Building a reward must be cheap, since every check of a config does it: nothing is fetched then, and
the only files that are read are local ones whose sha256 was not given.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpo.errors import ConfigError, RewardError
from ddpo.rewards.models.pretrained import few
from ddpo.rewards.models.torch_zip import read_torch_zip

PINNED = {
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "THUDM/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
}
"""Commits of the hub's models that rewards name by default."""

_CONFIGS = ("*.json", "*.jinja", "merges.txt", "vocab.txt")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./+-]+)")
_TIMEOUT_S = 60

Part = TypeVar("Part")


@dataclass(frozen=True)
class ModelFolder:
    """A model as transformers saves it: a folder on disk, or a hub id at a commit.

    Attributes:
        name: Path or hub id, as the config has it.
        revision: The commit, or ``sha256:`` and a digest of the folder's files.
        local: The folder, where it is one on disk.
    """

    name: str
    revision: str
    local: Path | None = None

    def fetch(self, weights: bool = True) -> Path:
        """Return the folder of its files, fetching them from the hub where needed.

        Args:
            weights: Whether the weights are needed too, beside configs and tokenizer.

        Raises:
            RewardError: The hub has no such model, or cannot be reached.
        """
        if self.local is not None:
            return self.local
        wanted = [*_CONFIGS, *(_SAFETENSORS if weights else ())]
        with _naming_the_hub(self.name, self.revision):
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=wanted))


@dataclass(frozen=True)
class WeightsFile:
    """One file of weights: on disk, at a URL, or in a hub repository at a commit.

    Attributes:
        name: Path, URL or ``owner/name/file``, as the config has it.
        revision: The commit, or ``sha256:`` and the file's.
        sha256: What the file must hash to; None where the commit says it.
        local: The file, where it is one on disk.
    """

    name: str
    revision: str
    sha256: str | None = None
    local: Path | None = None

    def tensors(self, inside: str | None = None) -> dict[str, Tensor]:
        """Fetch and read it.

        Args:
            inside: Key of the mapping of tensors, where what was saved is a larger whole.

        Returns:
            Tensors by name, on the CPU, in the type that they are stored in.

        Raises:
            RewardError: It cannot be had, has another sha256, or holds something else.
        """
        path = self._fetch()
        if path.suffix == ".safetensors":
            try:
                return load_file(path)
            except (SafetensorError, OSError) as error:
                raise RewardError(f"{path} cannot be read as safetensors: {error}") from error
        tree = read_torch_zip(path)
        found = tree.get(inside) if inside in tree else tree
        if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
            where = f" under {inside!r}" if inside in tree else ""
            raise RewardError(f"{path} holds more than tensors by name{where}: {few(tree)}")
        return found

    def _fetch(self) -> Path:
        if self.local is not None:
            path = self.local
        elif self.name.startswith("https://"):
            path = self._download()
        else:
            repository, file = _hub_file(self.name)
            with _naming_the_hub(repository, self.revision):
                path = Path(hf_hub_download(repository, file, revision=self.revision))
        if self.sha256 is not None:
            found = _file_sha256(path)
            if found != self.sha256:
                raise RewardError(
                    f"{path} has the sha256 {found}, expected {self.sha256}. Fetch it again; or, "
                    "if it is the file that you mean, give its sha256 in the reward's parameters"
                )
        return path

    def _download(self) -> Path:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddpo/weights"
        target = folder / f"{self.sha256}{Path(self.name).suffix}"
        if target.is_file():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                part = Path(aside) / target.name
                with (
                    urllib.request.urlopen(self.name, timeout=_TIMEOUT_S) as source,
                    part.open("wb") as file,
                ):
                    shutil.copyfileobj(source, file)
                found = _file_sha256(part)
                if found == self.sha256:
                    part.replace(target)
                    return target
        except (OSError, HTTPException) as error:
            raise RewardError(
                f"{self.name} cannot be fetched ({error}); fetch it by hand, and give its path "
                "instead of the address"
            ) from error
        raise RewardError(
            f"{self.name} has the sha256 {found}, expected {self.sha256}: what is served there is "
            "another file. Give the path of a copy"
        )


def find_model(name: str, revision: str | None) -> ModelFolder:
    """Pin a model that a config names; nothing is fetched.

    Args:
        name: A folder as ``save_pretrained`` writes it, or a hub id.
        revision: Commit of a hub id; None for those of `PINNED` and for folders.

    Returns:
        The model. Of a folder, the files that are loaded are read for their digest, once a process.

    Raises:
        ConfigError: Neither a folder nor a hub id, or a hub id without a commit.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"model {name!r} is a folder, which has no revision; leave it out")
        files = sorted({f for p in (*_CONFIGS, *_SAFETENSORS) for f in folder.glob(p)})
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}\0{_file_sha256(file)}\0".encode())
        return ModelFolder(name, f"sha256:{digest.hexdigest()}", folder)
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"model {name!r} is no folder here and no hub id; expected a folder as save_pretrained "
            "writes it, or `owner/name`"
        )
    return ModelFolder(name, _commit(name, revision))


def find_weights(name: str, revision: str | None, sha256: str | None) -> WeightsFile:
    """Pin a file of weights that a config names; nothing is fetched.

    Args:
        name: A path, an address https://..., or ``owner/name/file`` of the hub; safetensors, or a
            zip of ``torch.save``, which is read without unpickling.
        revision: Commit of a hub file; None for those of `PINNED`, paths and addresses.
        sha256: The file's. Must be given for an address. Of a path it is made here otherwise, once
            a process.

    Returns:
        The file.

    Raises:
        ConfigError: No such file, no commit, or no sha256 where one is needed.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ConfigError(f"{sha256!r} is no sha256; expected 64 hex digits (`sha256sum FILE`)")
    path = Path(name).expanduser()
    hub = _HUB_FILE.fullmatch(name)
    if revision is not None and (path.is_file() or not hub):
        raise ConfigError(f"weights {name!r} are no file of the hub, and have no revision; drop it")
    if path.is_file():
        return WeightsFile(name, f"sha256:{sha256 or _file_sha256(path)}", sha256, path)
    if name.startswith("https://"):
        if sha256 is None:
            raise ConfigError(f"weights {name!r} need their sha256: an address may serve anything")
        return WeightsFile(name, f"sha256:{sha256}", sha256)
    if not hub:
        raise ConfigError(
            f"there is no file {name!r}; expected the path of the weights, https://..., or "
            "`owner/name/file` of the hub"
        )
    return WeightsFile(name, _commit(hub[1], revision), sha256)


def load_part(
    what: str,
    from_pretrained: Callable[..., Part],
    model: ModelFolder,
    *,
    weights: bool = False,
    **arguments: Any,
) -> Part:
    """Load something of a model, fetched where needed: no pickles, no code that comes along.

    Args:
        what: What is loaded, for the message.
        from_pretrained: That of its class, or of one of transformers' auto classes.
        model: Where from.
        weights: Whether the model's weights are part of it.
        arguments: Further arguments of it.

    Returns:
        What was loaded.

    Raises:
        RewardError: The hub has no such model or cannot be reached; a file is missing, or does not
            hold it.
    """
    folder = model.fetch(weights)
    try:
        return from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **arguments,
        )
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RewardError(
            f"{what} of {model.name!r} ({model.revision}) cannot be loaded: "
            f"{type(error).__name__}: {_first_line(error)}. Expected config.json, "
            "model.safetensors, the tokenizer's files and preprocessor_config.json, as "
            "save_pretrained writes them; pickles (.bin) are not read"
        ) from error


@contextlib.contextmanager
def _naming_the_hub(repository: str, revision: str) -> Iterator[None]:
    """Turn what the hub's client raises into a `RewardError` with the way out."""
    try:
        yield
    except (HfHubHTTPError, OSError, ValueError) as error:  # a wrong id is a ValueError
        raise RewardError(
            f"{repository!r} ({revision}) cannot be had from the hub: {_first_line(error)}. Check "
            "the spelling and the network, log in with `hf auth login` if it is gated, or fetch it "
            "elsewhere and give its path"
        ) from error


def _commit(repository: str, revision: str | None) -> str:
    revision = revision or PINNED.get(repository)
    if revision is None or not _COMMIT.fullmatch(revision):
        raise ConfigError(
            f"hub model {repository!r} has the revision {revision!r}; pin a commit (40 hex digits, "
            "under `Files` on its page): a branch may move, and the scores with it"
        )
    return revision


def _hub_file(name: str) -> tuple[str, str]:
    owner, repository, file = name.split("/", 2)
    return f"{owner}/{repository}", file


def _file_sha256(path: Path) -> str:
    state = path.stat()
    return _sha256_of(path.absolute(), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256_of(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
