"""Atomic writes and exclusive creation on each kind of filesystem.

fsspec reads the same way everywhere; writing differs. On local disks and in memory, its own
`mode="create"` is exists-then-open, so that two racing writers can both win; on object stores it is
a conditional put.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ddpo.store.fs_errors import call_errors
from ddpo.store.nameless import made_file

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the file names of unfinished writes, which pyarrow, globs and `Store.list` skip."""


CONFLICT_WAITS_S = (0.1, 0.2, 0.4, 0.8, None)
"""Seconds before each retry while an object store is busy with another put of the same key."""


UPLOAD_PART_BYTES = 8 * 2**20
"""Part size of a file's upload to S3, whose limit of 10,000 parts allows for 80 GB."""

UPLOADED_AT_ONCE = 4
"""Parts of a file that are uploaded, and so in memory, at the same time."""

WRITER = "ddpo-writer"
"""Name of the metadata entry that identifies which put wrote an object on S3."""


Maker = Callable[[Path], object]
"""Writes an object's bytes to an empty file, or replaces the file.

If it returns a future, that is of the file's SHA-256, in hex digits.
"""


class Backend(Protocol):
    """Writes on one kind of filesystem. Paths are absolute, in that filesystem's notation."""

    def made(self, path: str, make: Maker) -> AbstractContextManager[Path]:
        """Make a local file, to be written with `write_file` to the folder of `path`.

        It is deleted when the context is left.
        """
        ...

    def flush(self, file: Path) -> None:
        """Do ahead what `write_file` would wait for; the file does not change any more."""
        ...

    def write_file(self, path: str, file: Path) -> None:
        """Write an object from such a file atomically; replace an existing one."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write an object atomically; replace an existing one."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write an object only if there is none; return whether this call wrote it."""
        ...


class LocalBackend:
    """POSIX disks: a temporary file, fsync, then a rename or a hard link, then fsync the folder."""

    def __init__(self, root: str) -> None:
        self._above_root = Path(root).parent
        self._durable_folders: set[Path] = set()

    @contextmanager
    def made(self, path: str, make: Maker) -> Iterator[Path]:
        """Make a file beside `path`, whose folder is made durable when the context is left."""
        folder = Path(path).parent
        self._make_folder(folder)
        temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            temporary.touch(exist_ok=False)
            make(temporary)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(folder)

    def flush(self, file: Path) -> None:
        """Write the file to the disk."""
        _fsync(file)

    def write_file(self, path: str, file: Path) -> None:
        """Rename the file to `path` once it is durable."""
        _fsync(file)
        file.replace(path)

    def write(self, path: str, data: bytes) -> None:
        """Replace the file at `path` atomically and durably."""
        with self.made(path, lambda file: file.write_bytes(data)) as temporary:
            _fsync(temporary)
            temporary.replace(path)

    def create(self, path: str, data: bytes) -> bool:
        """Hard-link a finished file to `path`: the kernel lets exactly one caller succeed."""
        with self.made(path, lambda file: file.write_bytes(data)) as temporary:
            _fsync(temporary)
            try:
                Path(path).hardlink_to(temporary)
            except FileExistsError:
                return False
        return True

    def _make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The folder's entry in its parent must be durable too, whoever made it. Once per process.
        while folder != self._above_root and folder not in self._durable_folders:
            _fsync(folder.parent)
            self._durable_folders.add(folder)
            folder = folder.parent


class MemoryBackend:
    """fsspec's in-process filesystem, for tests; creation is exclusive among threads."""

    _lock = threading.Lock()

    def __init__(self, fs: MemoryFileSystem) -> None:
        self._fs = fs

    def made(self, path: str, make: Maker) -> AbstractContextManager[Path]:
        """Make a file in the folder for temporary files."""
        return made_file(make)

    def flush(self, file: Path) -> None:
        """Do nothing: the bytes go elsewhere."""

    def write_file(self, path: str, file: Path) -> None:
        """Replace the object."""
        with self._lock:
            self._fs.pipe_file(path, file.read_bytes())

    def write(self, path: str, data: bytes) -> None:
        """Replace the object."""
        with self._lock:
            self._fs.pipe_file(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Create the object under a lock."""
        with self._lock:
            if self._fs.exists(path):
                return False
            self._fs.pipe_file(path, data)
            return True


class ConditionalPutBackend:
    """Object stores, where puts are atomic and fsspec's `mode="create"` is a conditional put."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs = fs

    def made(self, path: str, make: Maker) -> AbstractContextManager[Path]:
        """Make a file in the folder for temporary files."""
        return made_file(make)

    def flush(self, file: Path) -> None:
        """Do nothing: the bytes go elsewhere."""

    def write_file(self, path: str, file: Path) -> None:
        """Put the object, as the filesystem uploads files."""
        self._fs.put_file(str(file), path)

    def write(self, path: str, data: bytes) -> None:
        """Put the object."""
        self._fs.pipe_file(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Put the object if there is none."""
        try:
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True


class S3Backend(ConditionalPutBackend):
    """S3 and servers that speak its protocol.

    Servers refuse a conditional put with different errors. And if the response to a successful put
    is lost, the client's retry is refused because of the client's own object. So every exclusive
    put carries a unique mark, and the mark on the stored object shows who wrote it.
    """

    def write_file(self, path: str, file: Path) -> None:
        """Upload the file, in parts if it is large; a failed upload is aborted."""
        _twice_if_forgotten(
            lambda: self._fs.put_file(
                str(file),
                path,
                chunksize=UPLOAD_PART_BYTES,
                max_concurrency=UPLOADED_AT_ONCE,
            )
        )

    def write(self, path: str, data: bytes) -> None:
        """Put the object, in parts if it is large."""
        _twice_if_forgotten(lambda: super(S3Backend, self).write(path, data))

    def create(self, path: str, data: bytes) -> bool:
        """Put the object if there is none; True even if the first response was lost."""
        mark = uuid.uuid4().hex
        for wait_s in CONFLICT_WAITS_S:
            try:
                self._fs.pipe_file(path, data, mode="create", Metadata={WRITER: mark})
            except call_errors() as error:
                try:
                    writer = self._writer(path)
                except call_errors():
                    # The first error is the informative one; its cause is the server's answer.
                    raise error from error.__cause__
                if writer is not None:
                    return writer == mark
                if not _is_busy(error) or wait_s is None:
                    raise
                time.sleep(wait_s)
            else:
                return True
        raise AssertionError("the last round returns or raises")

    def _writer(self, path: str) -> str | None:
        """Return the mark of the stored object, '' if it has none, None if there is no object."""
        try:
            # Specific to s3fs, so not in fsspec's types.
            found: dict[str, str] = cast(Any, self._fs).metadata(path)
        except FileNotFoundError:
            return None
        return found.get(WRITER, "")


def _twice_if_forgotten(put: Callable[[], None]) -> None:
    """Put, and once more if the server knows no such multipart upload.

    It forgets an upload that is complete: if that response was lost, the client's retry gets a 404.
    If the bucket itself is missing, the second put fails too.
    """
    try:
        put()
    except FileNotFoundError:
        put()


def _is_busy(error: Exception) -> bool:
    """Return whether to try again later: AWS answers 409 to the later of two racing puts.

    A 503 after botocore's last retry does not count: retrying on top would multiply the attempts.
    """
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    answer = response.get("ResponseMetadata", {})
    status = answer.get("HTTPStatusCode")
    return status == 409 or (status == 503 and not answer.get("MaxAttemptsReached"))


def backend_for(fs: AbstractFileSystem, root: str) -> Backend:
    """Return the backend for a filesystem and a root path in it."""
    if isinstance(fs, LocalFileSystem):
        return LocalBackend(root)
    if isinstance(fs, MemoryFileSystem):
        return MemoryBackend(fs)
    if "s3" in fs.protocol:
        return S3Backend(fs)
    return ConditionalPutBackend(fs)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
