"""Delete a whole run: its records, manifests and objects.

The deletion is recorded first, and the run's own record goes next: from then on nobody can open,
resume or fork the run, and its name is not free until the last object is gone. A deletion that was
killed is completed by the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict

from ddpo.errors import RunHasForks, RunNotFound, StoreCallFailed, StoreError
from ddpo.store import keys, runs
from ddpo.store.documents import Sealed
from ddpo.store.objects import Store
from ddpo.store.runs import StartRecord
from ddpo.store.upkeep.uploads import abort_uploads


class TrackedAt(BaseModel):
    """Where a start of the run was shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    """MLflow's tracking URI."""
    experiment: str
    """The experiment."""


class DeletionRecord(Sealed):
    """What the rest of a deletion needs to know once the run's other records are gone."""

    run_id: str
    """The run."""
    uid: str
    """As `Run.uid`; empty if the run was never started, or its starts cannot be read."""
    tracked_at: tuple[TrackedAt, ...]
    """Where its starts were shown."""


@dataclass(frozen=True)
class Deletion:
    """A run that may be deleted."""

    store: Store
    """The store."""
    record: DeletionRecord
    """The run, and where it is shown."""
    sizes: dict[str, int]
    """Size in bytes of each of its objects and records, by key."""
    begun: bool
    """Whether an earlier deletion of the run was interrupted."""

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.record.run_id


def plan_deletion(store: Store, run_id: str) -> Deletion:
    """Find all that belongs to a run, and check that no fork needs it; change nothing.

    Raises:
        InvalidKey: The run id is not allowed.
        RunNotFound: The store has nothing of such a run.
        RunHasForks: It has forks.
        StoreError: Another run cannot be read, and may be a fork.
    """
    sizes = {key: size for key, size in store.sizes().items() if _is_of(key, run_id)}
    if not sizes:
        runs.load_run(store, run_id)  # raises, with similar names
    _check_no_forks(store, run_id)
    key = keys.deletion_key(run_id)
    if key in sizes:
        record = DeletionRecord.from_bytes(key, store.read(key))
        return Deletion(store, record, sizes, begun=True)
    return Deletion(store, _record_of(store, run_id), sizes, begun=False)


def begin_deletion(deletion: Deletion) -> None:
    """Record the deletion, and delete the run's record: the run can no longer be used.

    Raises:
        RunHasForks: The run has been forked since the deletion was planned.
        StoreError: As `plan_deletion`.
    """
    store, run_id = deletion.store, deletion.run_id
    store.put_if_absent(keys.deletion_key(run_id), deletion.record.to_bytes())
    try:
        # A fork looks for the record of the deletion after its own: one of both sees the other.
        _check_no_forks(store, run_id)
    except StoreError:
        if not deletion.begun:
            store.delete(keys.deletion_key(run_id))
        raise
    store.delete(keys.run_key(run_id))


def finish_deletion(deletion: Deletion, on_key: Callable[[str], None] = lambda key: None) -> None:
    """Delete all that belongs to the run; manifests first, so that they list only what exists.

    That includes what was written since the deletion was planned, and unfinished uploads if the
    bucket permits that.

    Args:
        deletion: The deletion, which has begun.
        on_key: Called with each key before it is deleted.
    """
    store, run_id = deletion.store, deletion.run_id
    while rest := _left(store, run_id):
        for key in rest:
            on_key(key)
            store.delete(key)
    with suppress(StoreCallFailed):
        abort_uploads(store, run_id, grace=timedelta(0))
    last = keys.deletion_key(run_id)
    on_key(last)
    store.delete(last)


def _left(store: Store, run_id: str) -> list[str]:
    """Return the keys of all that is left of a run but the record of its deletion."""
    found = store.list(hidden=True)
    own = {key for key in found if _is_of(key, run_id)} - {keys.deletion_key(run_id)}
    ordered = sorted(own, key=lambda key: (not keys.is_manifest(key), key))
    return [*keys.fork_records(found, run_id), *ordered]


def _is_of(key: str, run_id: str) -> bool:
    return keys.belongs_to(key, run_id) or keys.is_record_of(key, run_id)


def _check_no_forks(store: Store, run_id: str) -> None:
    """Refuse a run with forks, also those that were killed before they were recorded beside it."""
    forks: list[str] = []
    for other in runs.list_runs(store):
        if other == run_id:
            continue
        try:
            fork: Any = runs.load_run(store, other).identity.get("fork")
        except RunNotFound:
            continue
        except StoreError as error:
            raise StoreError(
                f"run {run_id!r} is not deleted, since run {other!r}, which cannot be read, may be "
                f"a fork of it: {error}. Restore it, or delete it first (`ddpo delete {other}`)"
            ) from error
        if isinstance(fork, dict) and fork.get("run_id") == run_id:
            forks.append(other)
    if forks:
        raise RunHasForks(run_id, forks)


def _record_of(store: Store, run_id: str) -> DeletionRecord:
    try:
        starts = runs.list_starts(store, run_id)
    except StoreError:  # a damaged run can be deleted too; its pages stay
        starts = []
    found = dict.fromkeys(at for start in starts if (at := _tracked_at(start)))
    uid = starts[0].uid if starts else ""
    return DeletionRecord(run_id=run_id, uid=uid, tracked_at=tuple(found))


def _tracked_at(start: StartRecord) -> TrackedAt | None:
    operation: Any = start.operation
    try:
        tracking = operation["tracking"]
        return TrackedAt(uri=tracking["uri"], experiment=tracking["experiment"])
    except (KeyError, TypeError):
        return None
