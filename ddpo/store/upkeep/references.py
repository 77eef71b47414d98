"""Find the objects that other runs refer to, which retention must spare."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from ddpo.errors import StoreError
from ddpo.store import keys
from ddpo.store.keys import Partition, RetiredPart
from ddpo.store.kinds import Kind
from ddpo.store.manifests import Artefact, Manifest
from ddpo.store.objects import Store

_logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Artefact)
R = TypeVar("R")


def referenced_by_others(
    store: Store, run_id: str, kind: Kind[T], *, unless_retired: RetiredPart | None = None
) -> set[str]:
    """Return the keys that other runs' artefacts of a kind list outside their own folders.

    Only a fork's first epochs do that, so each run is read up to its first epoch that does not.

    Args:
        store: The store.
        run_id: The run to leave out.
        kind: The kind.
        unless_retired: Leave out artefacts whose own run has retired this part of them.

    Raises:
        StoreError: Another run cannot be read.
    """
    by_run: defaultdict[str, defaultdict[int, list[Partition]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for where in kind.partitions_of(store):
        if where.run_id != run_id:
            by_run[where.run_id][where.epoch].append(where)
    referenced: set[str] = set()
    for other, epochs in by_run.items():
        for epoch, parts in sorted(epochs.items()):
            objects: set[str] = set()
            for where in parts:
                objects |= object_keys(kind.require(store, where).manifest)
            foreign = {key for key in objects if not keys.belongs_to(key, other)}
            if not foreign:
                break
            retired = unless_retired and store.exists(
                keys.retired_key(unless_retired, other, epoch)
            )
            if not retired:
                referenced |= foreign
    return referenced


def object_keys(manifest: Manifest) -> set[str]:
    """Return the keys of all objects that a manifest lists."""
    return {stored.key for stored in manifest.objects.values()}


def unless_unreadable(run_id: str, what: str, read: Callable[[], R]) -> R | None:
    """Return what `read` returns; None, with a warning, if a store error prevents it.

    The caller then deletes nothing and leaves that to a later call.
    """
    try:
        return read()
    except StoreError as error:
        _logger.warning("keeping all old %s of %s for now: %s", what, run_id, error)
        return None
