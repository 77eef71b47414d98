"""The records of a run: its identity, written once, and the operation settings of each start."""

from __future__ import annotations

import difflib
import json
import os
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import JsonValue

from ddpo.basics.digests import canonical_json
from ddpo.errors import MissingObject, RunBeingDeleted, RunIdentityMismatch, RunNotFound
from ddpo.store import keys
from ddpo.store.documents import Sealed, differences
from ddpo.store.objects import Store, now


class RunRecord(Sealed):
    """A run's identity, written once by its first start."""

    run_id: str
    """The run."""
    identity: dict[str, JsonValue]
    """The half of the config that never changes."""
    numerics: dict[str, JsonValue]
    """What the bytes of results depend on, frozen as the first start resolved it."""
    code: dict[str, JsonValue]
    """Versions of the code that started it."""


class StartRecord(Sealed):
    """The operation settings of one start of a run."""

    uid: str
    """Random. That of the first start distinguishes the run from others of its name."""
    operation: JsonValue
    """The half of the config that may change from start to start."""
    at: datetime | None = None
    """When it was (UTC)."""
    host: str = ""
    """Name of the machine."""
    process: int = 0
    """Number of the process on that machine."""


class EndRecord(Sealed):
    """How a start of a run ended; a killed process leaves none."""

    outcome: Literal["finished", "stopped", "failed"]
    """Whether all epochs were done, somebody or the gate stopped it, or an error ended it."""
    reason: str = ""
    """The error, or why the gate stopped it."""
    at: datetime
    """When it was (UTC)."""


@dataclass(frozen=True)
class Starts:
    """The first and the last start of a run, and how the last one ended, if it has."""

    number: int
    """The number of the last start, from 1; 0 if there is none."""
    first: StartRecord | None
    last: StartRecord | None
    end: EndRecord | None


class ForkRecord(Sealed):
    """A record that each fork leaves beside its parent."""

    fork: str
    """The fork's run id."""
    epoch: int
    """The epoch at which it forks."""


def create_or_check_run(
    store: Store,
    run_id: str,
    *,
    identity: Mapping[str, Any],
    numerics: Mapping[str, Any],
    code: Mapping[str, Any],
) -> RunRecord:
    """Create a run, or check that the one in the store is the same.

    Args:
        store: The store.
        run_id: The run.
        identity: The half of the config that never changes, as nested JSON.
        numerics: As resolved by this start; used only if it is the first.
        code: Versions of the code; used only if this start is the first.

    Returns:
        The record in the store, with the numerics that the first start froze.

    Raises:
        InvalidKey: The run id is not allowed.
        RunIdentityMismatch: The run has another identity; lists the differences.
        CorruptObject: Its record is damaged.
        UnreadableData: Likewise.
    """
    record = RunRecord(
        run_id=run_id, identity=_plain(identity), numerics=_plain(numerics), code=_plain(code)
    )
    key = keys.run_key(run_id)
    if store.put_if_absent(key, record.to_bytes()):
        return record
    stored = RunRecord.from_bytes(key, store.read(key))
    # The id too: on a case-insensitive filesystem, 'A' finds the run 'a'.
    found = differences({"run_id": stored.run_id}, {"run_id": run_id})
    found += differences(stored.identity, record.identity)
    if found:
        raise RunIdentityMismatch(run_id, found)
    return stored


def load_run(store: Store, run_id: str) -> RunRecord:
    """Return a run's record.

    Raises:
        InvalidKey: The run id is not allowed.
        RunNotFound: There is no such run; the message has similar run ids.
        RunBeingDeleted: Its deletion has begun.
        CorruptObject: The record is damaged.
        UnreadableData: Likewise.
    """
    key = keys.run_key(run_id)
    try:
        return RunRecord.from_bytes(key, store.read(key))
    except MissingObject:
        check_not_being_deleted(store, run_id)
        nearest = difflib.get_close_matches(run_id, list_runs(store))
        raise RunNotFound(run_id, store.root, nearest) from None


def list_runs(store: Store) -> list[str]:
    """Return the ids of the runs in the store, sorted."""
    found = (keys.run_of_record(key) for key in store.list("runs"))
    return sorted(run_id for run_id in found if run_id is not None)


def append_operation(store: Store, run_id: str, operation: JsonValue) -> int:
    """Record the operation settings of a new start, after the earlier ones.

    Returns:
        The number of the start, from 1.
    """
    record = StartRecord(
        uid=uuid.uuid4().hex,
        operation=operation,
        at=now(),
        host=socket.gethostname(),
        process=os.getpid(),
    )
    data = record.to_bytes()
    number = len(_numbers(store.list(keys.starts_prefix(run_id)))) + 1
    while not store.put_if_absent(keys.start_key(run_id, number), data):
        number += 1
    return number


def list_starts(store: Store, run_id: str) -> list[StartRecord]:
    """Return the records of all starts, the first start first.

    Raises:
        CorruptObject: A record is damaged.
        UnreadableData: Likewise.
    """
    numbers = _numbers(store.list(keys.starts_prefix(run_id)))
    return [_read_start(store, run_id, number) for number in numbers]


def list_ends(store: Store, run_id: str) -> dict[int, EndRecord]:
    """Return how the starts of a run ended, by their numbers; killed ones are missing.

    Raises:
        CorruptObject: A record is damaged.
        UnreadableData: Likewise.
    """
    found = store.list(keys.starts_prefix(run_id))
    ended = {start[1]: key for key in found if (start := keys.start_of_record(key)) and start[2]}
    return {number: EndRecord.from_bytes(key, store.read(key)) for number, key in ended.items()}


def read_starts(store: Store, run_id: str, found: Iterable[str] | None = None) -> Starts:
    """Return the first and the last start of a run, and how the last one ended.

    Args:
        store: The store.
        run_id: The run.
        found: The keys in the folder of its starts, if they are known.

    Raises:
        CorruptObject: A record is damaged.
        UnreadableData: Likewise.
    """
    found = list(store.list(keys.starts_prefix(run_id)) if found is None else found)
    numbers = _numbers(found)
    if not numbers:
        return Starts(0, None, None, None)
    last = numbers[-1]
    first = _read_start(store, run_id, numbers[0])
    key = keys.end_key(run_id, last)
    return Starts(
        number=last,
        first=first,
        last=first if len(numbers) == 1 else _read_start(store, run_id, last),
        end=EndRecord.from_bytes(key, store.read(key)) if key in found else None,
    )


def record_end(
    store: Store,
    run_id: str,
    number: int,
    outcome: Literal["finished", "stopped", "failed"],
    reason: str = "",
) -> None:
    """Record how a start of a run ended, once.

    Args:
        store: The store.
        run_id: The run.
        number: The number of the start, from 1.
        outcome: How it ended.
        reason: The error, without credentials.
    """
    record = EndRecord(outcome=outcome, reason=reason, at=now())
    store.put_if_absent(keys.end_key(run_id, number), record.to_bytes())


def list_operations(store: Store, run_id: str) -> list[JsonValue]:
    """Return the operation settings of all starts, the first start first.

    Raises:
        CorruptObject: A record is damaged.
        UnreadableData: Likewise.
    """
    return [start.operation for start in list_starts(store, run_id)]


def run_uid(store: Store, run_id: str) -> str:
    """Return what distinguishes a started run from others of its name.

    Raises:
        MissingObject: The run was never started.
        CorruptObject: The record of its first start is damaged.
        UnreadableData: Likewise.
    """
    return _read_start(store, run_id, 1).uid


def check_not_being_deleted(store: Store, run_id: str) -> None:
    """Refuse a run whose deletion has begun.

    Raises:
        RunBeingDeleted: It has.
    """
    if store.exists(keys.deletion_key(run_id)):
        raise RunBeingDeleted(run_id, store.root)


def record_fork(store: Store, run_id: str, fork: str, epoch: int) -> None:
    """Record beside a run that it was forked at an epoch, once."""
    record = ForkRecord(fork=fork, epoch=epoch)
    store.put_if_absent(keys.fork_key(run_id, fork), record.to_bytes())


def _numbers(found: Iterable[str]) -> list[int]:
    """Return the numbers of the starts whose records are among these keys, sorted."""
    parsed = map(keys.start_of_record, found)
    return sorted(start[1] for start in parsed if start and not start[2])


def _read_start(store: Store, run_id: str, number: int) -> StartRecord:
    key = keys.start_key(run_id, number)
    return StartRecord.from_bytes(key, store.read(key))


def _plain(value: Mapping[str, Any]) -> dict[str, JsonValue]:
    return json.loads(canonical_json(value))
