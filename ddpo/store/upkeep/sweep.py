"""Garbage collection: delete objects that no manifest lists.

Such objects are left behind by a writer that died before its manifest or while writing a file, or
that lost a race to another writer. They waste space and do no other harm. The lease of a process
that died while it trained a run is such an object too; a living process renews its own.
"""

from __future__ import annotations

from datetime import timedelta

from ddpo.errors import MissingObject
from ddpo.store import keys, manifests, objects
from ddpo.store.objects import REFRESH_AFTER, Store, is_hidden

DEFAULT_GRACE = timedelta(days=1)
"""Age below which an object may belong to a task that has not committed yet."""


def find_unreferenced(
    store: Store, run_id: str, *, grace: timedelta = DEFAULT_GRACE
) -> dict[str, int]:
    """Find a run's objects that no manifest of any run lists.

    Args:
        store: The store.
        run_id: The run.
        grace: Objects younger than this are left alone. Must exceed `REFRESH_AFTER`, within which
            `Store.put` reuses an object that it finds.

    Returns:
        Sizes in bytes by key, sorted.

    Raises:
        ValueError: The grace period is too short.
        CorruptObject: A manifest is damaged, so what it lists is unknown.
        UnreadableData: Likewise.
        MissingObject: A manifest that another refers to is missing.
    """
    if grace <= REFRESH_AFTER:
        raise ValueError(
            f"a grace period of {grace}: expected more than {REFRESH_AFTER}; a shorter one could "
            "delete what a running task has just written"
        )
    limit = objects.now() - grace
    keys.validate_run_id(run_id)
    # Objects before manifests: what is committed in between then counts as referenced.
    old = {
        key: size
        for key, (size, modified) in store.ages().items()
        if _is_swept(key, run_id) and modified < limit
    }
    listed: set[str] = set()
    pending = store.list(keys.MANIFESTS)
    seen = set(pending)
    while pending:
        key = pending.pop()
        found = manifests.find(store, key)
        if found is None:
            raise MissingObject(key, store.root)
        listed |= {stored.key for stored in found.manifest.objects.values()}
        # A run may commit during the listing, so manifests that are referred to are read too.
        referred = {ref.key for ref in manifests.references(found.manifest.inputs)} - seen
        pending += sorted(referred)
        seen |= referred
    return {key: old[key] for key in sorted(old.keys() - listed)}


def _is_swept(key: str, run_id: str) -> bool:
    """Return whether a key may be left over: data, a lease, or an unfinished write of a record."""
    if keys.is_record_of(key, run_id):
        return key == keys.lease_key(run_id) or is_hidden(key)
    return keys.belongs_to(key, run_id) and not keys.is_manifest(key)


def sweep(store: Store, run_id: str, *, grace: timedelta = DEFAULT_GRACE) -> dict[str, int]:
    """Delete a run's objects that no manifest lists; see :func:`find_unreferenced`.

    Args:
        store: The store.
        run_id: The run.
        grace: Objects younger than this are left alone.

    Returns:
        Sizes in bytes of what was deleted, by key.
    """
    deleted: dict[str, int] = {}
    for key, size in find_unreferenced(store, run_id, grace=grace).items():
        # Checked again: a task may have found, rewritten and committed it since.
        modified = store.modified(key)
        if modified is not None and modified < objects.now() - grace:
            store.delete(key)
            deleted[key] = size
    return deleted
