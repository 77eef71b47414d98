"""How long a run has had its devices, by what the store keeps of its starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import JsonValue

from ddpo.runs import Run
from ddpo.store.runs import list_ends, list_starts


@dataclass(frozen=True)
class DeviceTime:
    """The seconds of all starts, times the number of devices of each."""

    seconds: float
    whole: bool
    """Whether each start says on how many devices it computed; otherwise one was counted."""


def device_time(run: Run, commits: Sequence[datetime]) -> DeviceTime | None:
    """Return how long a run has had its devices; None if no start has a time.

    A start counts from its record to its end. One that was killed, or goes on, has no end: it
    counts up to its last commit.

    Args:
        run: The run.
        commits: When epochs were committed, in order.

    Raises:
        StoreError: A record is damaged or missing.
    """
    starts = list_starts(run.store, run.run_id)
    ends = list_ends(run.store, run.run_id)
    seconds, whole, found = 0.0, True, False
    for index, start in enumerate(starts):
        if start.at is None:
            continue
        after = starts[index + 1].at if index + 1 < len(starts) else None
        own = [at for at in commits if at > start.at and (after is None or at < after)]
        end = ends.get(index + 1)
        until = end.at if end else max(own, default=start.at)
        devices = _devices(start.operation)
        seconds += max((until - start.at).total_seconds(), 0.0) * (devices or 1)
        whole, found = whole and devices is not None, True
    return DeviceTime(seconds, whole) if found else None


def _devices(operation: JsonValue) -> int | None:
    """Return on how many devices a start computed; None if that was one for each GPU there was."""
    engine = operation.get("engine") if isinstance(operation, dict) else None
    if not isinstance(engine, dict) or engine.get("type") == "local":
        return 1
    workers = engine.get("workers")
    return workers if isinstance(workers, int) else None
