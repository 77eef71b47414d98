"""Models and weights that rewards name: pinned when a reward is built, fetched when it scores.

Building a reward must be cheap, since every check of a config does it: nothing is fetched, and only
local files whose sha256 was not given are read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from ddpo.basics.paths import expand
from ddpo.errors import ConfigError, RewardError
from ddpo.rewards.models.pretrained import few

if TYPE_CHECKING:
    from torch import Tensor

PINNED = {
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "THUDM/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
}
"""Commits of the Hub models that rewards use by default."""

_CONFIGS = ("*.json", "*.jinja", "merges.txt", "vocab.txt")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./+-]+)")
_TIMEOUT_S = 60
_SETTLED_NS = 2 * 10**9
"""A file that changed less than this ago may change again without another time of last change."""

Part = TypeVar("Part")


@dataclass(frozen=True)
class ModelFolder:
    """A model as transformers saves it: a local folder, or a Hub id at a commit."""

    name: str
    """Path or Hub id, as in the config."""
    revision: str
    """The commit; for a folder, ``sha256:`` and a digest of its files."""
    local: Path | None = None
    """The folder, if it is local."""

    def check(self) -> None:
        """Check that a folder's files are those that were pinned; a commit's do not change.

        Raises:
            RewardError: One has changed.
        """
        if self.local is not None and _folder_revision(self.local) != self.revision:
            raise RewardError(
                f"the files of the model in {self.local} have changed since the reward was built: "
                f"expected {self.revision}. Restore them, or start another run"
            )

    def fetch(self, weights: bool = True) -> Path:
        """Return the folder with its files, downloading them from the Hub if necessary.

        Args:
            weights: Whether the weights are needed as well as configs and tokenizer.

        Raises:
            RewardError: The Hub has no such model, or cannot be reached.
        """
        if self.local is not None:
            return self.local
        wanted = [*_CONFIGS, *(_SAFETENSORS if weights else ())]
        with _naming_the_hub(self.name, self.revision):
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=wanted))


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights: local, at a URL, or in a Hub repository at a commit."""

    name: str
    """Path, URL or ``owner/name/file``, as in the config."""
    revision: str
    """The commit, or ``sha256:`` and the digest of the file."""
    sha256: str | None = None
    """Expected digest of the file; None if the commit pins it."""
    local: Path | None = None
    """The file, if it is local."""

    def check(self) -> None:
        """Check that a local file is the one that was pinned; others are checked as they arrive.

        Raises:
            RewardError: It has changed.
        """
        if self.local is not None:
            self._check_sha256(self.local)

    def tensors(self, inside: str | None = None) -> dict[str, Tensor]:
        """Download the file if necessary, and read it.

        Args:
            inside: Key of the mapping of tensors, if the file contains more than that.

        Returns:
            Tensors by name, on the CPU, in the stored dtype.

        Raises:
            RewardError: It cannot be downloaded, has another sha256, or contains something else.
        """
        from safetensors.torch import load_file
        from torch import Tensor

        from ddpo.rewards.models.torch_zip import read_torch_zip

        path = self._fetch()
        if path.suffix == ".safetensors":
            try:
                return load_file(path)
            except (SafetensorError, OSError) as error:
                raise RewardError(f"cannot read {path} as safetensors: {error}") from error
        tree = read_torch_zip(path)
        tensors = tree.get(inside) if inside in tree else tree
        if not isinstance(tensors, dict) or not all(
            isinstance(tensor, Tensor) for tensor in tensors.values()
        ):
            where = f" under {inside!r}" if inside in tree else ""
            raise RewardError(f"{path} contains more than named tensors{where}: {few(tree)}")
        return tensors

    def _fetch(self) -> Path:
        if self.local is not None:
            path = self.local
        elif self.name.startswith("https://"):
            path = self._download()
        else:
            repository, file = _hub_file(self.name)
            with _naming_the_hub(repository, self.revision):
                path = Path(hf_hub_download(repository, file, revision=self.revision))
        self._check_sha256(path)
        return path

    def _check_sha256(self, path: Path) -> None:
        if self.sha256 is None:
            return
        found = _file_sha256(path)
        if found != self.sha256:
            raise RewardError(
                f"{path} has the sha256 {found}, expected {self.sha256}. Restore it or download it "
                "again; or, if it is the intended file, start a run with its sha256 in the "
                "reward's parameters"
            )

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
                f"cannot download {self.name} ({error}); download it by hand and give its path "
                "instead of the address"
            ) from error
        raise RewardError(
            f"{self.name} has the sha256 {found}, expected {self.sha256}: the file there has "
            "changed. Give the path of a copy of the original"
        )


def find_model(name: str, revision: str | None) -> ModelFolder:
    """Pin a model that a config names, without downloading anything.

    The files of a folder are read for their digest, once per process.

    Args:
        name: A folder written by ``save_pretrained``, or a Hub id.
        revision: Commit of a Hub id; None for those in `PINNED` and for folders.

    Raises:
        ConfigError: The name is neither a folder nor a Hub id, or a Hub id has no commit.
    """
    folder = Path(expand(name))
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"model {name!r} is a folder, which has no revision; remove it")
        return ModelFolder(name, _folder_revision(folder), folder)
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"model {name!r} is neither a local folder nor a Hub id; expected a folder written by "
            "save_pretrained, or `owner/name`"
        )
    return ModelFolder(name, _commit(name, revision))


def find_weights(name: str, revision: str | None, sha256: str | None) -> WeightsFile:
    """Pin a file of weights that a config names, without downloading anything.

    Args:
        name: A path, an address https://..., or ``owner/name/file`` on the Hub; safetensors, or a
            file of ``torch.save``, which is read without unpickling.
        revision: Commit of a Hub file; None for those in `PINNED`, for paths and for addresses.
        sha256: Digest of the file; required for an address. That of a local file is computed if it
            is not given, once per process.

    Raises:
        ConfigError: There is no such file, or commit or sha256 are missing.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ConfigError(f"{sha256!r} is not a sha256; expected 64 hex digits (`sha256sum FILE`)")
    path = Path(expand(name))
    hub = _HUB_FILE.fullmatch(name)
    if revision is not None and (path.is_file() or not hub):
        raise ConfigError(
            f"weights {name!r} are not on the Hub, so they have no revision; remove it"
        )
    if path.is_file():
        sha256 = sha256 or _file_sha256(path)
        return WeightsFile(name, f"sha256:{sha256}", sha256, path)
    if name.startswith("https://"):
        if sha256 is None:
            raise ConfigError(f"weights {name!r} need a sha256: an address may serve anything")
        return WeightsFile(name, f"sha256:{sha256}", sha256)
    if not hub:
        raise ConfigError(
            f"there is no file {name!r}; expected the path of the weights, https://..., or "
            "`owner/name/file` on the Hub"
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
    """Load a part of a model, downloading it if necessary; no pickles, no remote code.

    Args:
        what: What is loaded, for messages.
        from_pretrained: That of its class, or of one of transformers' auto classes.
        model: The model.
        weights: Whether the part needs the model's weights.
        arguments: Further arguments of ``from_pretrained``.

    Raises:
        RewardError: The Hub has no such model or cannot be reached; or a file is missing or
            invalid.
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
            f"cannot load {what} of {model.name!r} ({model.revision}): "
            f"{type(error).__name__}: {_first_line(error)}. Expected config.json, "
            "model.safetensors, the tokenizer's files and preprocessor_config.json, as "
            "save_pretrained writes them; pickles (.bin) are not read"
        ) from error


@contextlib.contextmanager
def _naming_the_hub(repository: str, revision: str) -> Iterator[None]:
    """Convert errors of the Hub's client to a `RewardError` with the way out."""
    try:
        yield
    except (HfHubHTTPError, OSError, ValueError) as error:  # a wrong id is a ValueError
        raise RewardError(
            f"cannot download {repository!r} ({revision}) from the Hub: {_first_line(error)}. "
            "Check the spelling and the network, log in with `hf auth login` if it is gated, or "
            "download it elsewhere and give its path"
        ) from error


def _commit(repository: str, revision: str | None) -> str:
    revision = revision or PINNED.get(repository)
    if revision is None or not _COMMIT.fullmatch(revision):
        raise ConfigError(
            f"Hub model {repository!r} has the revision {revision!r}; pin a commit (40 hex digits, "
            "under `Files` on its page): a branch may move, and the scores with it"
        )
    return revision


def _hub_file(name: str) -> tuple[str, str]:
    owner, repository, file = name.split("/", 2)
    return f"{owner}/{repository}", file


def _folder_revision(folder: Path) -> str:
    """Return ``sha256:`` and a digest of the names and contents of a model's files."""
    digest = hashlib.sha256()
    for file in sorted({f for p in (*_CONFIGS, *_SAFETENSORS) for f in folder.glob(p)}):
        digest.update(f"{file.name}\0{_file_sha256(file)}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def _file_sha256(path: Path) -> str:
    state = path.stat()
    if time.time_ns() - state.st_mtime_ns < _SETTLED_NS:
        return _sha256_of(path)
    return _known_sha256(path.absolute(), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _known_sha256(path: Path, number: int, size: int, modified_ns: int) -> str:
    return _sha256_of(path)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
