"""Retention of checkpoints: deletes the tensors of those that nobody will start from.

A full fine-tuning checkpoint is some 10 GB. Its manifest and its JSON documents are small and stay,
so the history of a run stays whole. A record of the retirement comes first, so that a missing
object reads as retired (`RetiredObject`) and not as damage. If a call is killed, the next one
finishes it.
"""

from __future__ import annotations

from collections import defaultdict

from ddpo.errors import InvalidRetention, MissingObject
from ddpo.store import keys, manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo.store.upkeep import forks
from ddpo.store.upkeep.references import object_keys, referenced_by_others, unless_unreadable


def retire_checkpoints(
    store: Store,
    run_id: str,
    *,
    keep_newest: int,
    keep_every: int | None,
    needed_from: int | None = None,
) -> list[int]:
    """Delete the tensors of a run's old checkpoints.

    Kept are the newest `keep_newest` checkpoints, those whose epoch is a multiple of `keep_every`,
    those that a fork will start from, and every object that a kept checkpoint, or another run's,
    refers to. If another run cannot be read, nothing is deleted this time.

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
    epochs = [where.epoch for where in CHECKPOINT.partitions_of(store, run_id)]
    kept = set(epochs[-keep_newest:])
    if keep_every is not None:
        kept.update(epoch for epoch in epochs if epoch % keep_every == 0)
    if needed_from is not None:
        kept.update(epoch for epoch in epochs if epoch >= needed_from)
    # By what is still there, so that a call costs what it deletes, not the length of the run.
    present: defaultdict[int, set[str]] = defaultdict(set)
    for key in store.list(CHECKPOINT.data_folder("weights", run_id)):
        parsed = keys.parse_object(key)
        if parsed is not None and key.endswith(keys.TENSORS_SUFFIX):
            present[parsed[1].epoch].add(key)
    candidates = sorted((set(epochs) - kept) & present.keys())
    if not candidates:
        return []
    awaited = unless_unreadable(
        run_id, "checkpoints", lambda: forks.awaited_checkpoints(store, run_id)
    )
    if awaited is None:
        return []
    kept.update(awaited.intersection(epochs))
    commits = {
        epoch: CHECKPOINT.commit_of(store, Partition(run_id, epoch))
        for epoch in candidates
        if epoch not in kept
    }
    # Recorded before looking for references: a fork that commits meanwhile either is seen here,
    # or sees the record (see `is_retired`).
    doomed: dict[int, set[str]] = {}
    for epoch, commit in commits.items():
        key = keys.retired_key("checkpoints", run_id, epoch)
        if commit is None:
            raise MissingObject(key, store.root)
        inputs = {"checkpoint": commit.ref}
        manifests.commit(store, key, kind="retired-checkpoint", inputs=inputs, objects={})
        doomed[epoch] = object_keys(commit.manifest) & present[epoch]
    referenced = unless_unreadable(
        run_id,
        "checkpoints",
        lambda: referenced_by_others(store, run_id, CHECKPOINT, unless_retired="checkpoints"),
    )
    if referenced is None:
        return []
    for epoch in kept:
        referenced |= object_keys(CHECKPOINT.require(store, Partition(run_id, epoch)).manifest)
    retired: list[int] = []
    for epoch, objects in doomed.items():
        for key in sorted(objects - referenced):
            store.delete(key)
        if objects - referenced:
            retired.append(epoch)
    return retired


def is_retired(store: Store, run_id: str, epoch: int) -> bool:
    """Return whether a checkpoint's tensors are deleted, or about to be.

    A fork that refers to another run's checkpoint asks this after its own commit. If not, the
    objects stay: any later retirement sees the fork's manifest.
    """
    return store.exists(keys.retired_key("checkpoints", run_id, epoch))
