"""What lies below a folder, and since when, on any filesystem that fsspec knows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


def files_below(fs: AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    """Find all files below a folder.

    Args:
        fs: The filesystem.
        folder: Full path of the folder; it need not be there.

    Returns:
        What fsspec says of each, by full path.

    Raises:
        OSError: A folder among them may not be listed.
    """
    if isinstance(fs, LocalFileSystem | MemoryFileSystem):
        found = _walk(fs, folder)
    else:
        listed: Any = fs.find(folder, detail=True)  # typed as a list too
        found = listed
    # SeaweedFS lists an emptied folder as itself.
    return {str(path): info for path, info in found.items() if path.startswith(folder + "/")}


def folders_in(fs: AbstractFileSystem, folder: str) -> list[str]:
    """Find the folders that lie directly in a folder, at the price of one call.

    Args:
        fs: The filesystem.
        folder: Full path of the folder; it need not be there.

    Returns:
        Their names, sorted.

    Raises:
        OSError: The folder may not be listed.
    """
    try:
        listed: Any = fs.ls(folder, detail=True)  # typed as a list of names too
    except FileNotFoundError:
        return []
    paths = [str(info["name"]).rstrip("/") for info in listed if info["type"] == "directory"]
    return sorted(path.rpartition("/")[2] for path in paths if path.startswith(folder + "/"))


def written_at(fs: AbstractFileSystem, path: str, info: dict[str, Any]) -> datetime | None:
    """Return when a file was last written.

    Args:
        fs: The filesystem.
        path: Full path of the file.
        info: What fsspec says of it.

    Returns:
        The time in UTC; None where the filesystem does not tell.
    """
    found = info.get("mtime", info.get("LastModified", info.get("created")))
    if found is None:
        try:
            found = fs.modified(path)
        except (NotImplementedError, AttributeError, KeyError):
            return None
    if isinstance(found, datetime):
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    return datetime.fromtimestamp(float(found), UTC)


def _walk(fs: AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    """Find all files below a folder; raises where one may not be listed.

    fsspec's own walk leaves such folders out without a word, and a listing with holes is a wrong
    answer.
    """
    found: dict[str, dict[str, Any]] = {}
    pending = [folder]
    while pending:
        try:
            listing = fs.ls(pending.pop(), detail=True)
        except FileNotFoundError:
            continue
        for info in listing:
            if info["type"] == "directory":
                pending.append(info["name"])
            else:
                found[info["name"]] = info
    return found
