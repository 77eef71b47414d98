"""Find what a run's forks still need of it, by the records that they left beside it."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from ddpo.basics.validation import in_one_line
from ddpo.config import ForkConfig
from ddpo.errors import RunNotFound, UnreadableData
from ddpo.store import keys, runs
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH
from ddpo.store.objects import Store


def recorded(store: Store, run_id: str) -> Iterator[tuple[str, ForkConfig]]:
    """Yield the name and the fork settings of a run's forks, started or not.

    Left out are forks that were deleted, and later runs of the same name that fork elsewhere.

    Raises:
        StoreError: A fork's own record cannot be read.
    """
    for key in store.list(keys.forks_prefix(run_id)):
        name = keys.fork_of_record(key)
        try:
            raw = runs.load_run(store, name).identity.get("fork")
        except RunNotFound:
            continue
        if not isinstance(raw, dict) or raw.get("run_id") != run_id:
            continue
        try:
            yield name, ForkConfig.model_validate(raw)
        except ValidationError as error:
            raise UnreadableData(keys.run_key(name), in_one_line(error)) from error


def awaited_checkpoints(store: Store, run_id: str) -> set[int]:
    """Return the checkpoints of a run that its forks have not started from yet.

    A fork first scores the epochs before, which may take hours.
    """
    return {
        fork.epoch
        for name, fork in recorded(store, run_id)
        if not CHECKPOINT.exists(store, Partition(name, fork.epoch))
    }


def awaited_epochs(store: Store, run_id: str) -> set[int]:
    """Return the epochs of a run that its forks have not inherited yet.

    A fork of several epochs may be stopped between two of them; its record names them all.
    """
    awaited: set[int] = set()
    for name, fork in recorded(store, run_id):
        done = {where.epoch for where in EPOCH.partitions_of(store, name)}
        awaited |= set(range(fork.epoch, fork.epoch + fork.rollouts)) - done
    return awaited


def scored_epochs(store: Store, run_id: str) -> set[int]:
    """Return the epochs of a run whose samples its forks score before they start.

    The forks of a fork need them too, unless one in between resets its statistics.
    """
    return {
        epoch
        for name, fork in recorded(store, run_id)
        if _is_rebuilding(store, name, fork)
        for epoch in range(fork.epoch)
    }


def _is_rebuilding(store: Store, name: str, fork: ForkConfig) -> bool:
    if fork.statistics == "reset":
        return False
    if not CHECKPOINT.exists(store, Partition(name, fork.epoch)):
        return True
    return any(_is_rebuilding(store, *branch) for branch in recorded(store, name))
