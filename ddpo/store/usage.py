"""How many bytes a run has in the store."""

from __future__ import annotations

from ddpo.store.keys import run_folder
from ddpo.store.kinds import KINDS, Kind
from ddpo.store.objects import Store


def stored_bytes(store: Store, run_id: str) -> dict[str, int]:
    """Return the bytes of a run's objects by folder of the store, such as 'rollouts'.

    What retention has deleted, and what a fork only refers to, does not count.

    Args:
        store: The store.
        run_id: The run.
    """
    folders = {role.folder: kind for kind in KINDS for role in kind.roles.values()}
    found = {folder: _bytes(store, kind, folder, run_id) for folder, kind in folders.items()}
    return {folder: size for folder, size in sorted(found.items()) if size}


def _bytes(store: Store, kind: Kind, folder: str, run_id: str) -> int:
    parents = [folder]
    for _ in kind.partitions & {"reward_id", "images_id"}:
        parents = [f"{parent}/{name}" for parent in parents for name in store.folders(parent)]
    sizes = [store.sizes(f"{parent}/{run_folder(run_id)}") for parent in parents]
    return sum(size for found in sizes for size in found.values())
