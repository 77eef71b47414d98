"""Retention of epochs: deletes trajectories, or whole samples, of epochs that are old.

Trajectories are most of what a run stores. As with checkpoints, manifests stay, a record of the
retirement comes first, and a call that was killed is finished by the next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal

from ddpo.config import ForkConfig, Keep
from ddpo.errors import StoreError
from ddpo.store import keys, manifests
from ddpo.store.manifests import Committed
from ddpo.store.objects import Store
from ddpo.store.upkeep import forks

_logger = logging.getLogger(__name__)

Part = Literal["trajectories", "samples"]
PARTS: dict[Keep, tuple[Part, ...]] = {
    "everything": (),
    "images_and_scores": ("trajectories",),
    "checkpoints": ("trajectories", "samples"),
}
"""What each setting of `storage.retention.keep` drops."""


def retire_epochs(store: Store, run_id: str, *, keep: Keep, older_than: int) -> list[int]:
    """Delete what is no longer kept of a run's old epochs.

    What the rollouts of another run refer to stays, since a fork trains on it; and so does all of
    an epoch that a fork is still to adopt, and the samples that one is still to score for its
    prompt statistics. Where another run cannot be read, nothing is deleted
    this time.

    Args:
        store: The store.
        run_id: The run.
        keep: What stays.
        older_than: So many of the newest committed epochs are left alone, at least 1: a run that
            is resumed shows its last one again.

    Returns:
        Epochs of which this call deleted something, sorted.

    Raises:
        MissingObject: A manifest that an epoch's commit refers to is gone.
        CorruptObject: A manifest of the run is damaged.
        UnreadableData: Likewise.
    """
    retired: set[int] = set()
    referenced: set[str] | None = None
    awaited: set[int] | None = None
    scored: set[int] = set()
    newest = _newest_epoch(store, run_id) if PARTS[keep] else -1
    for part in PARTS[keep]:
        # By what is still there, so that a call costs what it deletes, not the length of the run.
        old = [epoch for epoch in _present(store, run_id, part) if epoch <= newest - older_than]
        if old and awaited is None:
            try:
                awaited = _awaited_by_forks(store, run_id)
                scored = _scored_by_forks(store, run_id)
            except StoreError as error:
                _put_off(run_id, error)
                break
        # Recorded before looking for references: a fork that commits meanwhile either is seen
        # here, or sees the record.
        spared = (awaited or set()) | (scored if part == "samples" else set())
        found = {epoch: _commit_of(store, run_id, epoch) for epoch in old if epoch not in spared}
        commits = {epoch: commit for epoch, commit in found.items() if commit is not None}
        for epoch, commit in commits.items():
            manifests.commit(
                store,
                keys.retired_epoch_key(part, run_id, epoch),
                kind=f"retired-{part}",
                inputs={"epoch": commit.ref.model_dump()},
                objects={},
            )
        if commits and referenced is None:
            try:
                referenced = _referenced_by_others(store, run_id)
            except StoreError as error:
                _put_off(run_id, error)
                break
        for epoch, commit in commits.items():
            record = keys.retired_epoch_key(part, run_id, epoch)
            doomed = {key for key in _objects(store, commit) if keys.retirement_of(key) == record}
            # Rollouts last: they tell the next call that this one was not finished.
            for key in sorted(doomed - (referenced or set()), key=_is_rollout):
                if store.exists(key):
                    store.delete(key)
                    retired.add(epoch)
    return sorted(retired)


def _put_off(run_id: str, error: StoreError) -> None:
    _logger.warning("nothing of %s's old epochs is deleted for now: %s", run_id, error)


def _is_rollout(key: str) -> bool:
    return key.startswith("rollouts/")


def _newest_epoch(store: Store, run_id: str) -> int:
    found = store.list(keys.epoch_manifests_prefix(run_id))
    return max((epoch for key in found if (epoch := keys.parse_epoch(key)) is not None), default=-1)


def _present(store: Store, run_id: str, part: Part) -> list[int]:
    prefix = (
        keys.trajectories_prefix(run_id) if part == "trajectories" else keys.rollouts_prefix(run_id)
    )
    found = {keys.parse_epoch(key) for key in store.list(prefix)}
    return sorted(epoch for epoch in found if epoch is not None)


def _commit_of(store: Store, run_id: str, epoch: int) -> Committed | None:
    """Return an epoch's commit; None where a person took it away, so that it is made anew."""
    return manifests.find(store, keys.epoch_manifest_key(run_id, epoch))


def _objects(store: Store, commit: Committed) -> Iterator[str]:
    """Yield the keys of all objects that an epoch's commit refers to."""
    for ref in manifests.references(commit.manifest.inputs):
        for stored in manifests.load(store, ref).objects.values():
            yield stored.key


def _referenced_by_others(store: Store, run_id: str) -> set[str]:
    """Collect what the rollouts of other runs refer to outside of their own folders.

    Only a fork's first epochs do that, one or several, so of each run the epochs are read up to one
    of its own.
    """
    by_run: dict[str, dict[int, list[str]]] = {}
    for key in store.list("manifests/rollouts"):
        owner = key.split("/")[2]
        epoch = keys.parse_epoch(key)
        if owner != f"run_id={run_id}" and epoch is not None:
            by_run.setdefault(owner, {}).setdefault(epoch, []).append(key)
    referenced: set[str] = set()
    for owner, epochs in by_run.items():
        for _, found in sorted(epochs.items()):
            listed = [manifests.find(store, key) for key in found]
            objects = {o.key for each in listed if each for o in each.manifest.objects.values()}
            foreign = {key for key in objects if owner not in key.split("/")}
            if not foreign:
                break
            referenced |= foreign
    return referenced


def _awaited_by_forks(store: Store, run_id: str) -> set[int]:
    """Collect the epochs of a run that its forks have not adopted yet.

    A fork of several epochs may be stopped between two of them; it names them all in its record.
    """
    awaited: set[int] = set()
    for name, fork in forks.recorded(store, run_id):
        listed = store.list(keys.epoch_manifests_prefix(name))
        done = {keys.parse_epoch(each) for each in listed}
        awaited |= set(range(fork.epoch, fork.epoch + fork.rollouts)) - done
    return awaited


def _scored_by_forks(store: Store, run_id: str) -> set[int]:
    """Collect the epochs whose samples forks score before they begin, which may take hours.

    A fork's own forks go back to them too, as far as none of them resets its statistics.
    """
    return {
        epoch
        for name, fork in forks.recorded(store, run_id)
        if _is_rebuilding(store, name, fork)
        for epoch in range(fork.epoch)
    }


def _is_rebuilding(store: Store, name: str, fork: ForkConfig) -> bool:
    if fork.statistics == "reset":
        return False
    if not store.exists(keys.checkpoint_manifest_key(name, fork.epoch)):
        return True
    return any(_is_rebuilding(store, *branch) for branch in forks.recorded(store, name))
