"""Temporary files that leave nothing behind, even if the process is killed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PREFIX = "ddpo-"
_DESCRIPTORS = Path("/proc/self/fd")
"""Where Linux shows the open files of a process, those without a name too."""


@contextmanager
def empty_file() -> Iterator[tuple[IO[bytes], Path]]:
    """Open an empty file in the folder for temporary files (TMPDIR) until the context is left.

    On Linux it has no name. Elsewhere it has one, which a process that is killed leaves there.

    Yields:
        The file, and a path under which it can be opened once more.
    """
    if _DESCRIPTORS.is_dir():
        with tempfile.TemporaryFile(prefix=PREFIX) as file:
            yield file, _DESCRIPTORS / str(file.fileno())
    else:
        with tempfile.NamedTemporaryFile(prefix=PREFIX) as named:
            yield named, Path(named.name)


@contextmanager
def made_file(make: Callable[[Path], object]) -> Iterator[Path]:
    """Let something write a file in the folder for temporary files, until the context is left.

    On Linux, its name is gone once it is written.

    Args:
        make: Writes the file at a path.

    Yields:
        A path under which the file can be read.
    """
    with tempfile.NamedTemporaryFile(prefix=PREFIX) as named:
        make(Path(named.name))
        if not _DESCRIPTORS.is_dir():
            yield Path(named.name)
            return
        file = Path(named.name).open("rb")  # noqa: SIM115  # closed below
    with file:
        yield _DESCRIPTORS / str(file.fileno())
