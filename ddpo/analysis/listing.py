"""The runs of a store as a list, read with few calls: of a run's epochs, the first and the last."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from ddpo.analysis.rewards import summarize
from ddpo.errors import DdpoError
from ddpo.runs.run import Run, run_of_record
from ddpo.runs.state import RunState, run_state
from ddpo.store import keys
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, EPOCH
from ddpo.store.objects import Store
from ddpo.store.runs import load_run, read_starts

Order = Literal["name", "started", "reward", "epoch"]

_KEYS = (
    *("run_id", "state", "reason", "epoch", "epochs", "model", "prompts", "reward", "algorithm"),
    *("learning_rate", "seed", "first_reward", "last_reward", "started", "parent", "forked_at"),
    "error",
)
_AT_ONCE = 16  # reads, most of which wait for a server


@dataclass(frozen=True)
class ListedRun:
    """A run that can be read."""

    run: Run
    """The run."""
    state: RunState
    """What it is doing."""
    started: datetime | None
    """When it was started for the first time (UTC)."""
    first: float | None
    """The mean reward of its first epoch; None before it is committed, or if there is none."""
    last: float | None
    """The mean reward of its last committed epoch."""

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.run.run_id

    def as_json(self) -> dict[str, Any]:
        """Return the run in JSON's types; the keys are those of every run."""
        config, fork = self.run.config, self.run.fork
        found = {
            "run_id": self.run_id,
            "state": self.state.word,
            "reason": self.state.reason,
            "epoch": self.state.epoch,
            "epochs": self.state.epochs,
            "model": config.model.path,
            "prompts": config.prompts.name,
            "reward": config.reward.name,
            "algorithm": config.algorithm.type,
            "learning_rate": config.optimizer.learning_rate,
            "seed": config.seed,
            "first_reward": self.first,
            "last_reward": self.last,
            "started": self.started.isoformat() if self.started else None,
            "parent": fork.parent_id if fork else None,
            "forked_at": fork.epoch if fork else None,
        }
        return {key: found.get(key) for key in _KEYS}


@dataclass(frozen=True)
class UnreadableRun:
    """A run that cannot be read."""

    run_id: str
    """The run's name."""
    error: DdpoError
    """Why."""

    def as_json(self) -> dict[str, Any]:
        """Return the run in JSON's types."""
        reason = " ".join(str(self.error).split())
        return {**dict.fromkeys(_KEYS), "run_id": self.run_id, "error": reason}


def list_runs(store: Store, order: Order = "name") -> list[ListedRun | UnreadableRun]:
    """Return the runs of a store.

    Args:
        store: The store.
        order: By name; or the latest, the highest last reward (by name of the reward) or the most
            epochs first. Runs that cannot be read come last then.
    """
    records: dict[str, list[str]] = defaultdict(list)
    for key in store.list("runs"):
        records[key.split("/")[1]].append(key)
    epochs: dict[str, list[int]] = defaultdict(list)
    for where in EPOCH.partitions_of(store):
        epochs[where.run_id].append(where.epoch)
    run_ids = sorted(run_id for run_id in records if keys.run_key(run_id) in records[run_id])

    def read(run_id: str) -> ListedRun | UnreadableRun:
        try:
            return _read(store, run_id, records[run_id], epochs.get(run_id, ()))
        except DdpoError as error:
            return UnreadableRun(run_id, error)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(read, run_ids))
    return found if order == "name" else sorted(found, key=_PLACES[order])


def _read(store: Store, run_id: str, records: Iterable[str], epochs: Sequence[int]) -> ListedRun:
    starts = read_starts(store, run_id, records)
    operation = starts.last.operation if starts.last else {}
    run = run_of_record(
        store,
        load_run(store, run_id),
        operation if isinstance(operation, dict) else {},
        starts.number or None,
        uid=starts.first.uid if starts.first else "",
    )
    first = last = _mean_reward(run, min(epochs)) if epochs else None
    if len(epochs) > 1:
        last = _mean_reward(run, max(epochs))
    return ListedRun(
        run=run,
        state=run_state(run, starts, max(epochs) + 1 if epochs else run.first_epoch),
        started=starts.first.at if starts.first else None,
        first=first,
        last=last,
    )


def _by_started(found: ListedRun | UnreadableRun) -> tuple[float, str]:
    started = found.started if isinstance(found, ListedRun) else None
    return -started.timestamp() if started else math.inf, found.run_id


def _by_reward(found: ListedRun | UnreadableRun) -> tuple[bool, str, float, str]:
    if isinstance(found, UnreadableRun):
        return True, "", 0.0, found.run_id
    best = math.inf if found.last is None else -found.last
    return False, found.run.config.reward.name, best, found.run_id


def _by_epoch(found: ListedRun | UnreadableRun) -> tuple[float, str]:
    return -found.state.epoch if isinstance(found, ListedRun) else math.inf, found.run_id


_PLACES: dict[str, Callable[[ListedRun | UnreadableRun], Any]] = {
    "started": _by_started,
    "reward": _by_reward,
    "epoch": _by_epoch,
}


def _mean_reward(run: Run, epoch: int) -> float | None:
    """Return the mean reward of an epoch; None if no sample has one."""
    table = ADVANTAGES.get(run.store, Partition(run.run_id, epoch, reward_id=run.reward_id))
    if table is None:
        return None
    rewards = summarize(table.rewards())
    return rewards.mean if rewards.scored else None
