"""Crashes at a chosen write, and the run that they happen to.

A crash is an exception that nothing catches, and a process's memory forgotten after it: what a
killed process leaves is what it wrote, and no more.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from mlflow.tracking import MlflowClient

from ddpo.config import RunConfig
from ddpo.runs import start_run
from ddpo.store import keys
from ddpo.store.backends import LocalBackend, MemoryBackend, S3Backend
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo_workflow.flows.train import first_unfinished_epoch
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.page import open_page
from ddpo_workflow.tasks.tracking.tracker import RunTracker
from tests.fold import as_in_a_new_process, run_epoch
from tests.tiny import tiny_config

RUN = "night"
Moment = Literal["before", "after"]
WRITES: tuple[tuple[type, str], ...] = (
    (LocalBackend, "write"),
    (LocalBackend, "create"),
    (LocalBackend, "write_file"),
    (MemoryBackend, "write"),
    (MemoryBackend, "create"),
    (MemoryBackend, "write_file"),
    (S3Backend, "write"),
    (S3Backend, "create"),
    (S3Backend, "write_file"),
    (Store, "delete"),
    (RunTracker, "log_metrics"),
    (RunTracker, "log_image"),
)
"""All that a run changes outside of its process: objects, and what MLflow shows."""


class Crash(BaseException):
    """The process dies here. No `except Exception` holds it up."""


@dataclass
class Writes:
    """The writes of a run, as they happen. After the crash there are none, from any thread.

    Attributes:
        crash_at: Which write to die at, from 1; 0 for none.
        moment: Before it takes effect, or after.
        made: What was written, in order.
    """

    crash_at: int = 0
    moment: Moment = "before"
    made: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, name: str, write: Callable[[], Any]) -> Any:
        with self._lock:
            if self.crash_at and len(self.made) == self.crash_at:
                raise Crash(self.made[-1])
            self.made.append(name)
            dies = len(self.made) == self.crash_at
        if dies and self.moment == "before":
            raise Crash(name)
        result = write()
        if dies:
            raise Crash(name)
        return result


@contextmanager
def watched(writes: Writes) -> Iterator[Writes]:
    """Let every write of this process pass through `writes` meanwhile."""

    def through(owner: type, name: str) -> Callable[..., Any]:
        right = getattr(owner, name)

        def write(self: Any, *words: Any, **named: Any) -> Any:
            what = f"{name} {words[0]}"
            return writes(what, lambda: right(self, *words, **named))

        return write

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WRITES:
            patch.setattr(owner, name, through(owner, name))
        yield writes


@dataclass(frozen=True)
class Night:
    """A run of two epochs that keeps as little as it may, where it is remembered and shown."""

    config: RunConfig
    store: Store

    @classmethod
    def plan(cls, model: Path, root: str, folder: Path, database: Path, /, **changes: Any) -> Night:
        """Plan a run.

        Args:
            model: A tiny pipeline.
            root: Of its store.
            folder: Gets MLflow's database, a copy of `database`: making one takes seconds.
            database: An empty MLflow database.
            changes: Parts of the config that differ.
        """
        folder.mkdir(parents=True)
        shutil.copy(database, folder / "mlflow.db")
        parts: dict[str, Any] = {
            "sampler": {"steps": 2},
            "rollouts": {"samples_per_epoch": 4, "shard_size": 2},
            "numerics": {"sample_batch_size": 2, "micro_batch_size": 2},
            "optimizer": {"learning_rate": 1e-2},
            "storage": {
                "root": root,
                "keep_newest_checkpoints": 1,
                "retention": {"keep": "checkpoints", "older_than": 1},
            },
            "tracking": {
                "uri": f"sqlite:///{folder}/mlflow.db",
                "pictures": {"prompts": ["a cat"], "seeds": [0]},
            },
            "epochs": 2,
        }
        config = tiny_config(model, **(parts | changes))
        return cls(config, Store.open(root, config.storage.s3))

    def go(self) -> None:
        """Start the run or go on with it, in a new process as far as it can tell."""
        as_in_a_new_process()
        run = start_run(self.config, RUN)
        page = open_page(run)
        first = first_unfinished_epoch(run)
        checkpoint = (
            CHECKPOINT.require_ref(run.store, Partition(RUN, first))
            if first
            else start.fn(run.handle)
        )
        for epoch in range(first, run.config.epochs):
            checkpoint = run_epoch(run, checkpoint, epoch, page.handle)
        page.finish("FINISHED")

    def crash(self, at: int, moment: Moment) -> str:
        """Go until a write, and die there; returns what that write was.

        Raises:
            AssertionError: There are not so many writes.
        """
        with watched(Writes(at, moment)) as writes, pytest.raises(Crash) as crash:
            self.go()
        assert len(writes.made) == at
        return str(crash.value)

    def content(self) -> dict[str, bytes]:
        """Return all that is stored, by key; the records of starts differ by nature."""
        return {
            key: self.store.read(key)
            for key in self.store.list()
            if not key.startswith(keys.starts_prefix(RUN))
        }

    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Return what MLflow shows: step and value of each metric, pictures by name and step."""
        client = MlflowClient(self.config.tracking.uri)
        (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        found = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        for file in client.list_artifacts(run.info.run_id, "images"):
            name, _, step = file.path.partition("+step+")
            kind = Path(file.path).suffix
            found.setdefault(name + kind, []).append((int(step.partition("+")[0]), 0.0))
        return {name: sorted(values) for name, values in found.items()}
