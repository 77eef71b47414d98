"""Retention of checkpoints: delete the tensors of those that nothing will start from.

A full fine-tuning checkpoint is some 10 GB. Its manifest and its JSON documents are small and stay,
so a run's history remains complete. A record of the retirement is written first, so that a missing
object is reported as retired (`RetiredObject`) and not as damaged. If a call is killed, the next
one finishes its work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

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
    also: Collection[int] = (),
) -> list[int]:
    """Delete the tensors of a run's old checkpoints.

    Kept are the newest `keep_newest` checkpoints, those whose epoch is a multiple of `keep_every`,
    those that a fork will start from, and every object that a kept checkpoint, or another run's,
    refers to. If another run cannot be read, nothing is deleted this time.

    Args:
        store: The store.
        run_id: The run.
        keep_newest: Number of newest checkpoints to keep, at least 1.
        keep_every: Also keep epochs 0, n, 2 n, ...; None for none of them.
        needed_from: Also keep this epoch's and all later ones: a resumed run repeats what follows
            its last committed epoch, and may find a checkpoint that is further ahead.
        also: Also keep these epochs.

    Returns:
        Epochs of the checkpoints of which this call deleted objects, sorted.

    Raises:
        InvalidRetention: `keep_newest` or `keep_every` is below 1.
        MissingObject: A manifest was deleted during this call.
        CorruptObject: A manifest is damaged.
        UnreadableData: Likewise.
    """
    if keep_newest < 1 or (keep_every is not None and keep_every < 1):
        raise InvalidRetention(keep_newest, keep_every)
    epochs = [where.epoch for where in CHECKPOINT.partitions_of(store, run_id)]
    kept = {*epochs[-keep_newest:], *also}
    if keep_every is not None:
        kept.update(epoch for epoch in epochs if epoch % keep_every == 0)
    if needed_from is not None:
        kept.update(epoch for epoch in epochs if epoch >= needed_from)
    # By listing what still exists: the cost depends on what is deleted, not on the run's length.
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
    # Recorded before looking for references: a fork that commits at the same time is either seen
    # here, or sees the record (see `is_retired`).
    doomed: dict[int, set[str]] = {}
    for epoch, commit in commits.items():
        key = keys.retired_key("checkpoints", run_id, epoch)
        if commit is None:
            raise MissingObject(CHECKPOINT.key(Partition(run_id, epoch)), store.root)
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
    for epoch in kept.intersection(epochs):
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

    A fork that refers to its parent's checkpoint calls this after its own commit. If the result is
    False, the objects stay: any later retirement sees the fork's manifest.
    """
    return store.exists(keys.retired_key("checkpoints", run_id, epoch))
