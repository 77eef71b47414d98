"""Objects: bytes under keys, written once, verified on every read."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from fsspec import AbstractFileSystem
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ddpo.basics.digests import sha256_bytes
from ddpo.basics.outages import Outage, patiently
from ddpo.config.s3 import S3Options
from ddpo.errors import (
    CorruptObject,
    InvalidKey,
    MissingObject,
    RetiredObject,
    StoreError,
    StoreUnavailable,
)
from ddpo.store import keys
from ddpo.store.backends import Maker, backend_for
from ddpo.store.fs_errors import named_call, read_on, read_whole
from ddpo.store.fs_listing import files_below, folders_in, written_at
from ddpo.store.fs_open import open_filesystem
from ddpo.store.nameless import empty_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

REFRESH_AFTER = timedelta(hours=1)
"""An existing object that is older than this is rewritten before it is committed."""

BLOCK_BYTES = 8 * 2**20
"""How much of an object is requested from a server, or read into memory, at once."""
READ_BYTES = 2 * 2**20
"""How much of it is hashed and copied to a file at once."""
_SLOW_AFTER_S = 5.0

T = TypeVar("T")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _whitelisted(key: str) -> str:
    try:
        return keys.check_key(key)
    except InvalidKey as error:
        raise ValueError(str(error)) from None  # pydantic reports ValueErrors with their location


Key = Annotated[str, AfterValidator(_whitelisted)]


class StoredObject(BaseModel):
    """An object's key, size and digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Key
    """Key relative to the store's root."""
    size: int = Field(ge=0)
    """Size in bytes."""
    sha256: Sha256
    """Digest of the bytes."""


Objects = Mapping[str, bytes | Maker | StoredObject]
"""Objects of an artefact by role: bytes, what makes a file, or what is already stored."""


class Store:
    """Objects below one root, on any filesystem that fsspec supports.

    Holds no state but the connection, is thread-safe, and pickles as its address. A process that
    has used a store on S3 must not be forked: the child would share its sockets.
    """

    def __init__(
        self,
        fs: AbstractFileSystem,
        path: str,
        s3: S3Options | None = None,
        patience_s: float = 0.0,
    ) -> None:
        self.patience_s = patience_s
        """For how many seconds each call is tried again while the store is unavailable."""
        self._fs = fs
        self._path = path.rstrip("/")
        self.s3 = s3
        """How to connect to the bucket, as given to `open`."""
        self._backend = backend_for(fs, self._path)
        self.root: str = fs.unstrip_protocol(self._path)
        """URL of the root, without a trailing slash."""
        self._outage = Outage(f"the store {self.root}")

    @classmethod
    def open(cls, root: str, s3: S3Options | None = None, patience_s: float = 0.0) -> Store:
        """Open a store, whether or not anything exists at its root; write nothing.

        Args:
            root: An fsspec URL, or a path (made absolute).
            s3: How to connect to a bucket; by default as the AWS environment variables say.
            patience_s: For how many seconds each call is tried again while it is unavailable.

        Raises:
            StoreNotWritable: The kind of store is unknown, or the address contains credentials.
        """
        fs, path = open_filesystem(root, s3)
        return cls(fs, path, s3, patience_s)

    @property
    def connection(self) -> tuple[AbstractFileSystem, str, S3Options | None, float]:
        """The arguments with which another `Store` reaches the same store."""
        return self._fs, self._path, self.s3, self.patience_s

    def patient(self, seconds: float) -> Store:
        """Return the same store, each call of which waits so long while it is unavailable."""
        return Store(self._fs, self._path, self.s3, seconds)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.root, self.s3, self.patience_s)

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def url(self, key: str) -> str:
        """Return the full URL of a key."""
        return f"{self.root}/{keys.check_key(key)}"

    def put(self, stem: str, suffix: str, data: bytes | Maker) -> StoredObject:
        """Write an object under a key that contains its digest.

        Nothing is written if the object exists in its full size and was written within the last
        hour: an older one that no manifest lists may be swept.

        Args:
            stem: Key without digest and suffix.
            suffix: File suffix with its dot, such as '.parquet'.
            data: The bytes; or what writes them to a local file, if memory may not hold them.

        Raises:
            InvalidKey: The stem or suffix is outside the whitelist.
        """
        if not isinstance(data, bytes):
            return self._put_file(stem, suffix, data)
        stored = _stored(stem, suffix, len(data), sha256_bytes(data))
        if not self._is_fresh(stored):
            self.replace(stored.key, data)
        return stored

    def _put_file(self, stem: str, suffix: str, make: Maker) -> StoredObject:
        told: list[object] = []

        def named(file: Path) -> None:
            with named_call("write", stem, str(file.parent), writes=True):
                told.append(make(file))

        with (
            named_call("write", stem, self.root, writes=True),
            self._backend.made(self._full(stem), named) as file,
        ):
            with ThreadPoolExecutor(1) as beside:
                flushed = beside.submit(self._backend.flush, file)
                if isinstance(told[0], Future):
                    digest: str = told[0].result()
                else:
                    with file.open("rb") as opened:
                        digest = hashlib.file_digest(opened, "sha256").hexdigest()
                flushed.result()
            stored = _stored(stem, suffix, file.stat().st_size, digest)
            key, full = stored.key, self._full(stored.key)
            if not self._is_fresh(stored):
                write = self._backend.write_file
                self._call("write", key, lambda: write(full, file), writes=True)
        return stored

    def replace(self, key: str, data: bytes) -> None:
        """Replace a damaged object atomically: readers see either the old bytes or the new."""
        full = self._full(key)
        self._call("write", key, lambda: self._backend.write(full, data), writes=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create an object exclusively; return False if one exists."""
        full = self._full(key)
        return self._call("create", key, lambda: self._backend.create(full, data), writes=True)

    def get(self, stored: StoredObject) -> bytes:
        """Read an object and verify its size and digest.

        Raises:
            MissingObject: It is missing (RetiredObject: it was deleted on purpose).
            CorruptObject: Its bytes do not match the digest.
        """
        self._check_size(stored)
        data = self.read(stored.key)
        found = sha256_bytes(data)
        if found != stored.sha256:
            raise CorruptObject(stored.key, stored.sha256, found)
        return data

    def load(self, stored: StoredObject) -> NDArray[np.uint8]:
        """Read an object into memory of its own, and verify it meanwhile; return its bytes, [size].

        For what is large, but fits into memory: it takes half the time of `fetch`. The memory is
        free again when the array and all its views are gone. Changing it changes nothing else.

        Raises:
            MissingObject: As `get`.
            CorruptObject: As `get`.
        """
        self._check_size(stored)
        data = np.empty(stored.size, np.uint8)
        found = self._read_into(stored.key, data.data)
        if found != stored.sha256:
            raise CorruptObject(stored.key, stored.sha256, found)
        return data

    @contextmanager
    def fetch(self, stored: StoredObject) -> Iterator[Path]:
        """Copy an object block by block to a local file, verified, until the context is left.

        It is an `empty_file`, in the folder for temporary files (TMPDIR). What is mapped of it
        remains readable.

        Raises:
            MissingObject: As `get`.
            CorruptObject: As `get`.
        """
        self._check_size(stored)
        with empty_file() as (copy, path):
            found = self._copied(stored.key, copy)
            if found != stored.sha256:
                raise CorruptObject(stored.key, stored.sha256, found)
            yield path

    def digest(self, key: str) -> str:
        """Return the sha256 of the object under a key, 64 hex digits, computed block by block.

        Raises:
            MissingObject: As `get`.
        """
        return self._copied(key, None)

    def _copied(self, key: str, copy: IO[bytes] | None) -> str:
        """Return the digest of an object, and copy it to a file, if there is one."""
        full = self._full(key)

        def digested() -> str:
            digest = hashlib.sha256()
            if copy is not None:
                copy.seek(0)  # a second try begins anew
                copy.truncate()
            file: Any  # typed as text or bytes
            with (
                self._fs.open(full, "rb", block_size=BLOCK_BYTES) as file,
                ThreadPoolExecutor(1) as beside,
            ):
                # A block is hashed while it is copied and the next one is read; no more than two
                # are in memory.
                hashed: Future[None] | None = None
                while block := read_on(lambda: file.read(READ_BYTES)):
                    if hashed is not None:
                        hashed.result()
                    hashed = beside.submit(digest.update, block)
                    if copy is not None:
                        with named_call("read", key, tempfile.gettempdir(), writes=True):
                            copy.write(block)
                            copy.flush()
                if hashed is not None:
                    hashed.result()
            return digest.hexdigest()

        return self._read(key, digested)

    def _read_into(self, key: str, space: memoryview) -> str:
        """Fill memory with the beginning of an object; return the digest of what was read."""
        full = self._full(key)

        def digested() -> str:
            digest, done = hashlib.sha256(), 0
            file: Any  # typed as text or bytes
            with (
                self._fs.open(full, "rb", block_size=BLOCK_BYTES) as file,
                ThreadPoolExecutor(1) as beside,
            ):
                while block := space[done : done + BLOCK_BYTES]:
                    count = read_on(lambda block=block: file.readinto(block))
                    if not count:
                        break
                    beside.submit(digest.update, block[:count])
                    done += count
            return digest.hexdigest()

        return self._read(key, digested)

    def _read(self, key: str, do: Callable[[], T]) -> T:
        try:
            return self._call("read", key, do)
        except FileNotFoundError:
            raise self._missing(key) from None

    def read(self, key: str) -> bytes:
        """Return the object under a key, unverified.

        Raises:
            MissingObject: As `get`.
        """
        full = self._full(key)
        data: Any = self._read(key, lambda: read_whole(lambda: self._fs.cat_file(full)))
        return data  # typed as str | bytes

    def size(self, key: str) -> int:
        """Return the size in bytes of the object under a key, 0 if there is none."""
        return self._size(key) or 0

    def exists(self, key: str) -> bool:
        """Return whether there is an object under the key."""
        return self._size(key) is not None

    def delete(self, key: str) -> None:
        """Delete the object under the key, if there is one."""
        full = self._full(key)
        with suppress(FileNotFoundError):
            self._call("delete", key, lambda: self._fs.rm_file(full))

    def list(self, prefix: str = "", *, hidden: bool = False) -> list[str]:
        """Return the keys below a folder, sorted.

        For garbage collection and listings of runs only: readers of data go by manifest.

        Args:
            prefix: A folder, without its slash; '' for the whole store. It need not exist.
            hidden: Whether to include unfinished writes and probes.
        """
        found = self._below(self._full(prefix) if prefix else self._path)
        return sorted(key for key in found if hidden or not is_hidden(key))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size in bytes of every key below a folder, unfinished writes included.

        Args:
            prefix: A folder, without its slash; '' for the whole store. It need not exist.
        """
        found = self._below(self._full(prefix) if prefix else self._path)
        return {key: int(info["size"]) for key, info in found.items()}

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder, sorted, with a single call.

        An emptied folder may be among them.

        Args:
            folder: The folder, without its slash. It need not exist.
        """
        full = self._full(folder)
        return self._call("list", folder, lambda: folders_in(self._fs, full))

    def ages(self) -> dict[str, tuple[int, datetime]]:
        """Return the size in bytes and the time of the last write (UTC) of every key.

        Unfinished writes are included.

        Raises:
            StoreError: The filesystem does not report when an object was written.
        """
        return {
            key: (int(info["size"]), self._modified(key, info))
            for key, info in self._below(self._path).items()
        }

    def modified(self, key: str) -> datetime | None:
        """Return when the object under a key was last written (UTC), None if there is none."""
        try:
            return self._modified(key, self._info(key))
        except FileNotFoundError:
            return None

    def _below(self, folder: str) -> dict[str, dict[str, Any]]:
        """Return fsspec's info on all objects below a folder, unfinished writes too, by key."""
        start = len(self._path) + 1
        found = self._call("list", folder[start:], lambda: files_below(self._fs, folder))
        return {path[start:]: info for path, info in found.items()}

    def _modified(self, key: str, info: dict[str, Any]) -> datetime:
        found = written_at(self._fs, self._full(key), info)
        if found is None:
            raise StoreError(
                f"{self.root} does not report when {key} was written, so it is unknown "
                "what is old enough to sweep; only local disks and S3 can be swept"
            )
        return found

    def _is_fresh(self, stored: StoredObject) -> bool:
        try:
            info = self._info(stored.key)
        except FileNotFoundError:
            return False
        young = now() - self._modified(stored.key, info) < REFRESH_AFTER
        return info["type"] == "file" and info["size"] == stored.size and young

    def _info(self, key: str) -> dict[str, Any]:
        full = self._full(key)
        return self._call("look at", key, lambda: self._fs.info(full))

    def _call(self, call: str, key: str, do: Callable[[], T], *, writes: bool = False) -> T:
        """Call the filesystem, with errors that name the call; wait while it is unavailable."""

        def named() -> T:
            with named_call(call, key, self.root, writes=writes):
                return do()

        # How long a transfer may take depends on its size.
        slow_after_s = None if call in ("read", "write") else _SLOW_AFTER_S
        return patiently(
            named, StoreUnavailable, self._outage, self.patience_s, slow_after_s=slow_after_s
        )

    def _full(self, key: str) -> str:
        return f"{self._path}/{keys.check_key(key)}"

    def _size(self, key: str) -> int | None:
        try:
            info = self._info(key)
        except FileNotFoundError:
            return None
        return info["size"] if info["type"] == "file" else None

    def _check_size(self, stored: StoredObject) -> None:
        size = self._size(stored.key)
        if size is not None and size != stored.size:
            # Hashed block by block: the wrong object may be too large for memory.
            raise CorruptObject(stored.key, stored.sha256, self.digest(stored.key))

    def _missing(self, key: str) -> MissingObject:
        retired_key = keys.retirement_of(key)
        if retired_key is not None and self.exists(retired_key):
            return RetiredObject(key, self.root, retired_key)
        return MissingObject(key, self.root)


def _stored(stem: str, suffix: str, size: int, digest: str) -> StoredObject:
    key = keys.check_key(f"{stem}-{digest[:12]}{suffix}")
    return StoredObject(key=key, size=size, sha256=digest)


def now() -> datetime:
    """Return the current time (UTC), from which the age of objects is counted."""
    return datetime.now(UTC)


def is_hidden(key: str) -> bool:
    """Return whether a key belongs to an unfinished write or a probe."""
    return any(segment.startswith(".") for segment in key.split("/"))
