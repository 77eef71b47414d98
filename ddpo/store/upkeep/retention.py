"""Retention of checkpoints: deletes the tensors of those that nobody will start from.

A whole UNet's checkpoint is some 10 GB. Its manifest and its JSON documents are small and stay, so
the history of a run stays whole. A record of the retirement comes first, so that a missing object
reads as retired (`RetiredObject`) and not as damage. A call that was killed is finished by the
next.
"""

from __future__ import annotations

import logging
from collections import defaultdict

from ddpo.errors import InvalidRetention, MissingObject, StoreError
from ddpo.store import keys, manifests
from ddpo.store.manifests import Committed
from ddpo.store.objects import Store
from ddpo.store.upkeep import forks

_logger = logging.getLogger(__name__)


def retire_checkpoints(
    store: Store,
    run_id: str,
    *,
    keep_newest: int,
    keep_every: int | None,
    needed_from: int | None = None,
) -> list[int]:
    """Deletes the tensors of a run's old checkpoints.

    Kept are the newest `keep_newest` checkpoints, those whose epoch is a multiple of `keep_every`,
    those that a fork is still to start from, and every object that a kept checkpoint, or another
    run's, refers to. Where another run cannot be read, nothing is deleted this time.

    Args:
        store: The store.
        run_id: The run.
        keep_newest: How many of the newest to keep, at least 1.
        keep_every: Keep epochs 0, n, 2 n, ... too; None for none of them.
        needed_from: Keep this epoch's and all later ones too. A resume repeats what follows the
            last committed epoch, and may find a checkpoint that is further ahead.

    Returns:
        Epochs of the checkpoints of which this call deleted something, sorted.

    Raises:
        InvalidRetention: `keep_newest` or `keep_every` is below 1.
        MissingObject: A manifest was deleted meanwhile.
        CorruptObject: A manifest is damaged.
        UnreadableData: Likewise.
    """
    if keep_newest < 1 or (keep_every is not None and keep_every < 1):
        raise InvalidRetention(keep_newest, keep_every)
    epochs = _committed_epochs(store).get(run_id, [])
    kept = set(epochs[-keep_newest:])
    if keep_every is not None:
        kept.update(epoch for epoch in epochs if epoch % keep_every == 0)
    if needed_from is not None:
        kept.update(epoch for epoch in epochs if epoch >= needed_from)
    # By what is still there, so that a call costs what it deletes, not the length of the run.
    present: defaultdict[int, set[str]] = defaultdict(set)
    for key in store.list(keys.checkpoints_prefix(run_id)):
        owner = keys.parse_checkpoint_object(key)
        if owner is not None and key.endswith(keys.TENSORS_SUFFIX):
            present[owner[1]].add(key)
    candidates = sorted((set(epochs) - kept) & present.keys())
    if not candidates:
        return []
    try:
        kept.update(_awaited_by_forks(store, run_id).intersection(epochs))
    except StoreError as error:
        _put_off(run_id, error)
        return []
    candidates = [epoch for epoch in candidates if epoch not in kept]
    # Recorded before looking for references: a fork that commits meanwhile either is seen here,
    # or sees the record (see `is_retired`).
    checkpoints = {epoch: _checkpoint(store, run_id, epoch) for epoch in candidates}
    for epoch, checkpoint in checkpoints.items():
        manifests.commit(
            store,
            keys.retired_checkpoint_key(run_id, epoch),
            kind="retired-checkpoint",
            inputs={"checkpoint": checkpoint.ref.model_dump()},
            objects={},
        )
    try:
        referenced = _referenced_by_others(store, run_id)
    except StoreError as error:
        _put_off(run_id, error)
        return []
    for epoch in kept:
        referenced |= _object_keys(_checkpoint(store, run_id, epoch))
    retired: list[int] = []
    for epoch, checkpoint in checkpoints.items():
        doomed = (_object_keys(checkpoint) & present[epoch]) - referenced
        for key in sorted(doomed):
            store.delete(key)
        if doomed:
            retired.append(epoch)
    return retired


def _put_off(run_id: str, error: StoreError) -> None:
    _logger.warning("no checkpoint of %s is deleted for now: %s", run_id, error)


def is_retired(store: Store, run_id: str, epoch: int) -> bool:
    """Returns whether a checkpoint's tensors are deleted, or about to be.

    A fork that refers to another run's checkpoint asks this after its own commit. If not, the
    objects stay: any later retirement sees the fork's manifest.
    """
    return store.exists(keys.retired_checkpoint_key(run_id, epoch))


def _committed_epochs(store: Store) -> dict[str, list[int]]:
    epochs: defaultdict[str, list[int]] = defaultdict(list)
    for key in store.list(keys.CHECKPOINT_MANIFESTS):
        owner = keys.parse_checkpoint_manifest(key)
        if owner is not None:
            epochs[owner[0]].append(owner[1])
    return dict(epochs)


def _checkpoint(store: Store, run_id: str, epoch: int) -> Committed:
    key = keys.checkpoint_manifest_key(run_id, epoch)
    found = manifests.find(store, key)
    if found is None:
        raise MissingObject(key, store.root)
    return found


def _object_keys(checkpoint: Committed) -> set[str]:
    return {stored.key for stored in checkpoint.manifest.objects.values()}


def _referenced_by_others(store: Store, run_id: str) -> set[str]:
    """Collects what the checkpoints of other runs refer to outside of their own folders.

    Only a fork's first checkpoints do that, so a run is read up to its first own checkpoint.
    """
    referenced: set[str] = set()
    for other, epochs in _committed_epochs(store).items():
        if other == run_id:
            continue
        own = keys.checkpoints_prefix(other) + "/"
        for epoch in epochs:
            checkpoint = _object_keys(_checkpoint(store, other, epoch))
            foreign = {key for key in checkpoint if not key.startswith(own)}
            if not foreign:
                break
            if not is_retired(store, other, epoch):
                referenced |= foreign
    return referenced


def _awaited_by_forks(store: Store, run_id: str) -> set[int]:
    """Collects the checkpoints that forks have not started from yet.

    A fork first scores the epochs before, which may take hours.
    """
    return {
        fork.epoch
        for name, fork in forks.recorded(store, run_id)
        if not store.exists(keys.checkpoint_manifest_key(name, fork.epoch))
    }
