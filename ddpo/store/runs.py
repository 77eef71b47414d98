"""A run's record: what it is (once), and how each start of it was operated."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from ddpo.basics.digests import canonical_json
from ddpo.errors import MissingObject, RunIdentityMismatch, RunNotFound, UnreadableData
from ddpo.store import keys
from ddpo.store.documents import differences, seal, unseal
from ddpo.store.objects import Store

SCHEMA_VERSION = 1


class RunRecord(BaseModel):
    """What a run is. Written once, by its first start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""
    run_id: str
    """The run."""
    identity: dict[str, JsonValue]
    """Half of the config that never changes."""
    numerics: dict[str, JsonValue]
    """What decides the bytes of a result, as the first start resolved it: frozen."""
    code: dict[str, JsonValue]
    """Versions of the code that started it."""


def create_or_check_run(
    store: Store,
    run_id: str,
    *,
    identity: Mapping[str, Any],
    numerics: Mapping[str, Any],
    code: Mapping[str, Any],
) -> RunRecord:
    """Creates a run, or checks that the one in the store is the same.

    Args:
        store: The store.
        run_id: The run.
        identity: Half of the config that never changes, as nested JSON.
        numerics: What this start resolved; counts only if it is the first.
        code: Versions of the code; likewise.

    Returns:
        The record in the store, with the numerics that the first start froze.

    Raises:
        InvalidKey: The run id is not allowed.
        RunIdentityMismatch: The run has another identity; lists what differs.
        CorruptObject: Its record is damaged.
        UnreadableData: Likewise.
    """
    record = RunRecord(
        run_id=run_id, identity=_plain(identity), numerics=_plain(numerics), code=_plain(code)
    )
    key = keys.run_key(run_id)
    if store.put_if_absent(key, seal(record.model_dump(mode="json"))):
        return record
    stored = _read(store, key)
    # The id too: 'A' finds the run 'a' where a filesystem ignores case.
    found = differences({"run_id": stored.run_id}, {"run_id": run_id})
    found += differences(stored.identity, record.identity)
    if found:
        raise RunIdentityMismatch(run_id, found)
    return stored


def load_run(store: Store, run_id: str) -> RunRecord:
    """Reads a run's record.

    Args:
        store: The store.
        run_id: The run.

    Returns:
        The record.

    Raises:
        InvalidKey: The run id is not allowed.
        RunNotFound: There is none; names the nearest run ids.
        CorruptObject: The record is damaged.
        UnreadableData: Likewise.
    """
    try:
        return _read(store, keys.run_key(run_id))
    except MissingObject:
        nearest = difflib.get_close_matches(run_id, list_runs(store))
        raise RunNotFound(run_id, store.root, nearest) from None


def list_runs(store: Store) -> list[str]:
    """Lists the ids of the runs in the store, sorted."""
    parts = [key.split("/") for key in store.list("runs")]
    return sorted(part[1] for part in parts if len(part) == 3 and part[2] == "run.json")


def append_operation(store: Store, run_id: str, operation: JsonValue) -> int:
    """Records how a start of the run is operated, after those before it.

    Args:
        store: The store.
        run_id: The run.
        operation: Half of the config that may change from start to start.

    Returns:
        The number of the start, from 1.
    """
    data = seal({"schema_version": SCHEMA_VERSION, "operation": operation})
    number = len(store.list(keys.starts_prefix(run_id))) + 1
    while not store.put_if_absent(keys.start_key(run_id, number), data):
        number += 1
    return number


def list_operations(store: Store, run_id: str) -> list[JsonValue]:
    """Reads how each start of a run was operated.

    Args:
        store: The store.
        run_id: The run.

    Returns:
        What `append_operation` recorded, the first start first.

    Raises:
        CorruptObject: A record is damaged.
        UnreadableData: Likewise.
    """
    starts = store.list(keys.starts_prefix(run_id))
    return [
        unseal(key, store.read(key), schema_version=SCHEMA_VERSION)["operation"] for key in starts
    ]


def _read(store: Store, key: str) -> RunRecord:
    document = unseal(key, store.read(key), schema_version=SCHEMA_VERSION)
    try:
        return RunRecord.model_validate(document)
    except ValidationError as error:
        raise UnreadableData(key, str(error)) from error


def _plain(value: Mapping[str, Any]) -> dict[str, JsonValue]:
    return json.loads(canonical_json(value))
