"""How each kind of filesystem writes an object whole, or creates it exclusively.

Reading is the same everywhere (fsspec); writing is not. fsspec's own `mode="create"` is
exists-then-open on local disks and in memory, so two racers can both win there; object stores
have a conditional put behind it.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ddpo.store.fs_errors import CALL_ERRORS

TEMPORARY_PREFIX = ".tmp-"
"""File names that start so are unfinished writes: no key, and hidden from pyarrow and globs."""


CONFLICT_WAITS_S = (0.1, 0.2, 0.4, 0.8, None)
"""Seconds before the next try where an object store is busy with another put of the same key."""


WRITER = "ddpo-writer"
"""Name of the metadata that tells whose put an object on S3 came from."""


class Backend(Protocol):
    """Writing on one kind of filesystem. Paths are absolute, in that filesystem's own form."""

    def write(self, path: str, data: bytes) -> None:
        """Writes an object that readers see whole or not at all; replaces what is there."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object only if there is none; returns whether this call wrote it."""
        ...


class LocalBackend:
    """POSIX disks: a temporary file, fsync, then a rename or a hard link, then fsync the folder."""

    def __init__(self, root: str) -> None:
        self._above_root = Path(root).parent
        self._durable_folders: set[Path] = set()

    def write(self, path: str, data: bytes) -> None:
        """Replaces the file at `path` atomically and durably."""
        with self._temporary_beside(Path(path), data) as temporary:
            temporary.replace(path)

    def create(self, path: str, data: bytes) -> bool:
        """Links a finished file to `path`, which the kernel lets exactly one caller do."""
        with self._temporary_beside(Path(path), data) as temporary:
            try:
                Path(path).hardlink_to(temporary)
            except FileExistsError:
                return False
        return True

    @contextmanager
    def _temporary_beside(self, path: Path, data: bytes) -> Iterator[Path]:
        self._make_folder(path.parent)
        temporary = path.with_name(TEMPORARY_PREFIX + uuid.uuid4().hex)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_folder(path.parent)

    def _make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder's entry in its parent must be durable too, whoever made it: once a process.
        while folder != self._above_root and folder not in self._durable_folders:
            _fsync_folder(folder.parent)
            self._durable_folders.add(folder)
            folder = folder.parent


class MemoryBackend:
    """fsspec's in-process filesystem, for tests; exclusive among the threads of a process."""

    _lock = threading.Lock()

    def __init__(self, fs: MemoryFileSystem) -> None:
        self._fs = fs

    def write(self, path: str, data: bytes) -> None:
        """Replaces the object."""
        with self._lock:
            self._fs.pipe_file(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Creates the object under the lock."""
        with self._lock:
            if self._fs.exists(path):
                return False
            self._fs.pipe_file(path, data)
            return True


class ConditionalPutBackend:
    """Object stores: puts are atomic, and fsspec's `mode="create"` is a conditional put."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs = fs

    def write(self, path: str, data: bytes) -> None:
        """Puts the object."""
        self._fs.pipe_file(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Puts the object if there is none."""
        try:
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True


class S3Backend(ConditionalPutBackend):
    """S3 and what speaks its protocol.

    Servers refuse a conditional put with different errors; and a client that lost the answer to a
    put that succeeded sends it again, and is refused by its own object. So every exclusive put
    carries a mark of its own, and what lies there in the end decides.
    """

    def write(self, path: str, data: bytes) -> None:
        """Puts the object, in parts if it is large."""
        try:
            super().write(path, data)
        except FileNotFoundError:
            # A server forgets an upload once its parts are joined, and says so if it is asked
            # again because its answer was lost. Where the bucket is gone, this fails alike.
            super().write(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Puts the object if there is none; True even where the first answer was lost."""
        mark = uuid.uuid4().hex
        for wait_s in CONFLICT_WAITS_S:
            try:
                self._fs.pipe_file(path, data, mode="create", Metadata={WRITER: mark})
            except CALL_ERRORS as error:
                try:
                    writer = self._writer(path)
                except CALL_ERRORS:
                    raise error from None  # the first error is the one that tells
                if writer is not None:
                    return writer == mark
                if not _is_busy(error) or wait_s is None:
                    raise
                time.sleep(wait_s)
            else:
                return True
        raise AssertionError("the last round returns or raises")

    def _writer(self, path: str) -> str | None:
        """Returns the mark of the object that is there, '' for one without, None for none."""
        try:
            # Of s3fs alone: not in fsspec's types.
            found: dict[str, str] = cast(Any, self._fs).metadata(path)
        except FileNotFoundError:
            return None
        return found.get(WRITER, "")


def _is_busy(error: Exception) -> bool:
    """Returns whether a server asks to come again: AWS says 409 to the later of two racing puts.

    A 503 that botocore gave up on is none: it came as often as a call is tried, and rounds of such
    tries would multiply.
    """
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    answer = response.get("ResponseMetadata", {})
    status = answer.get("HTTPStatusCode")
    return status == 409 or (status == 503 and not answer.get("MaxAttemptsReached"))


def backend_for(fs: AbstractFileSystem, root: str) -> Backend:
    """Returns the backend for a filesystem and a root path in it."""
    if isinstance(fs, LocalFileSystem):
        return LocalBackend(root)
    if isinstance(fs, MemoryFileSystem):
        return MemoryBackend(fs)
    if "s3" in fs.protocol:
        return S3Backend(fs)
    return ConditionalPutBackend(fs)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
