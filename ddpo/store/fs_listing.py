"""List files, folders and modification times on any filesystem that fsspec supports."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


def files_below(fs: AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    """Return fsspec's info on all files below a folder, by full path.

    Args:
        fs: The filesystem.
        folder: Full path of the folder; it need not exist.

    Raises:
        OSError: No permission to list one of the folders.
    """
    if isinstance(fs, LocalFileSystem | MemoryFileSystem):
        found = _walk(fs, folder)
    else:
        listed: Any = fs.find(folder, detail=True)  # typed as a list too
        found = listed
    # SeaweedFS lists an emptied folder as itself.
    return {str(path): info for path, info in found.items() if path.startswith(folder + "/")}


def folders_in(fs: AbstractFileSystem, folder: str) -> list[str]:
    """Return the names of the folders directly in a folder, sorted, with a single call.

    Args:
        fs: The filesystem.
        folder: Full path of the folder; it need not exist.

    Raises:
        OSError: No permission to list the folder.
    """
    try:
        listed: Any = fs.ls(folder, detail=True)  # typed as a list of names too
    except FileNotFoundError:
        return []
    paths = [str(info["name"]).rstrip("/") for info in listed if info["type"] == "directory"]
    return sorted(path.rpartition("/")[2] for path in paths if path.startswith(folder + "/"))


def written_at(fs: AbstractFileSystem, path: str, info: dict[str, Any]) -> datetime | None:
    """Return when a file was last written (UTC), None if the filesystem does not report it.

    Args:
        fs: The filesystem.
        path: Full path of the file.
        info: fsspec's info on it.
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
    """Return all files below a folder; raise if one of the folders cannot be listed.

    fsspec's own walk silently skips such folders, and an incomplete listing is wrong.
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
