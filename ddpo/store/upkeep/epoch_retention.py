"""Retention of epochs: delete the trajectories or all samples of old epochs.

Trajectories make up most of a run's data. As with checkpoints, manifests stay, a record of the
retirement is written first, and if a call is killed, the next one finishes its work.
"""

from __future__ import annotations

from typing import Literal

from ddpo.config import Keep
from ddpo.store import keys, manifests
from ddpo.store.artefacts import EpochCommit
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH, ROLLOUTS
from ddpo.store.manifests import Committed
from ddpo.store.objects import Store
from ddpo.store.upkeep import forks
from ddpo.store.upkeep.references import object_keys, referenced_by_others, unless_unreadable

Part = Literal["trajectories", "samples"]
PARTS: dict[Keep, tuple[Part, ...]] = {
    "everything": (),
    "images_and_scores": ("trajectories",),
    "checkpoints": ("trajectories", "samples"),
}
"""What each setting of `storage.retention.keep` deletes."""

_LAST_DELETED = {"trajectories": "trajectories", "samples": "rollouts"}
"""Role whose objects are deleted last of a part, and so show that the part is not yet deleted."""


def retire_epochs(store: Store, run_id: str, *, keep: Keep, older_than: int) -> list[int]:
    """Delete the parts of a run's old epochs that `keep` does not include.

    Kept are objects that the rollouts of another run refer to, since a fork trains on them; epochs
    that a fork has not inherited yet; and samples that a fork has not scored yet for its prompt
    statistics. If another run cannot be read, nothing is deleted this time.

    Args:
        store: The store.
        run_id: The run.
        keep: The parts to keep.
        older_than: Number of newest committed epochs to leave alone, at least 1: a resumed run
            logs its last epoch again.

    Returns:
        Epochs of which this call deleted objects, sorted.

    Raises:
        MissingObject: A manifest that an epoch's commit refers to is missing.
        CorruptObject: A manifest of the run is damaged.
        UnreadableData: Likewise.
    """
    retired: set[int] = set()
    referenced: set[str] | None = None
    needed: tuple[set[int], set[int]] | None = None
    committed = EPOCH.partitions_of(store, run_id) if PARTS[keep] else []
    newest = max((where.epoch for where in committed), default=-1)
    for part in PARTS[keep]:
        # By listing what still exists: the cost depends on what is deleted, not on the run length.
        old = [epoch for epoch in _present(store, run_id, part) if epoch <= newest - older_than]
        if old and needed is None:
            needed = unless_unreadable(
                run_id,
                "epochs",
                lambda: (forks.awaited_epochs(store, run_id), forks.scored_epochs(store, run_id)),
            )
            if needed is None:
                break
        awaited, scored = needed or (set(), set())
        spared = awaited | (scored if part == "samples" else set())
        # No commit: it was deleted by hand so that the epoch is recomputed.
        found = {e: EPOCH.commit_of(store, Partition(run_id, e)) for e in old if e not in spared}
        commits = {epoch: commit for epoch, commit in found.items() if commit is not None}
        # Recorded before looking for references: a fork that commits at the same time is either
        # seen here, or sees the record.
        for epoch, commit in commits.items():
            key = keys.retired_key(part, run_id, epoch)
            inputs = {"epoch": commit.ref}
            manifests.commit(store, key, kind=f"retired-{part}", inputs=inputs, objects={})
        if commits and referenced is None:
            referenced = unless_unreadable(
                run_id, "epochs", lambda: referenced_by_others(store, run_id, ROLLOUTS)
            )
            if referenced is None:
                break
        last = ROLLOUTS.data_folder(_LAST_DELETED[part], run_id)
        for epoch, commit in commits.items():
            record = keys.retired_key(part, run_id, epoch)
            doomed = {key for key in _objects(store, commit) if keys.retirement_of(key) == record}
            kept = referenced or set()
            for key in sorted(doomed - kept, key=lambda key: (key.startswith(f"{last}/"), key)):
                if store.exists(key):
                    store.delete(key)
                    retired.add(epoch)
    return sorted(retired)


def _present(store: Store, run_id: str, part: Part) -> list[int]:
    folder = ROLLOUTS.data_folder(_LAST_DELETED[part], run_id)
    parsed = (keys.parse_object(key) for key in store.list(folder))
    return sorted({where.epoch for _, where in filter(None, parsed)})


def _objects(store: Store, commit: Committed[EpochCommit]) -> set[str]:
    """Return the keys of all objects that an epoch's commit refers to."""
    found: set[str] = set()
    for ref in manifests.references(commit.manifest.inputs):
        found |= object_keys(manifests.load(store, ref))
    return found
