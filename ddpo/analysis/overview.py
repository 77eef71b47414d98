"""A run at a glance, and how two runs differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from ddpo.analysis.rewards import EpochRewards, trained_curve
from ddpo.basics.redaction import hide_credentials
from ddpo.errors import DdpoError
from ddpo.runs.outputs import outputs_folder
from ddpo.runs.run import Run, run_of_record
from ddpo.runs.state import RunState, run_state
from ddpo.store import keys
from ddpo.store.documents import Difference, differences
from ddpo.store.objects import Store
from ddpo.store.runs import load_run, read_starts

_ROWS = 20


@dataclass(frozen=True)
class Overview:
    """A run at a glance."""

    run: Run
    """The run."""
    code: dict[str, JsonValue]
    """Versions of the code that started it."""
    operation: dict[str, JsonValue]
    """The operation settings of its last start."""
    identity: dict[str, JsonValue]
    """The settings that never change, with the digests of what they name."""
    state: RunState
    """What it is doing."""
    curve: list[EpochRewards]
    """Its rewards by epoch, as far as epochs are committed."""
    forks: list[str]
    """The runs that were forked from it."""

    @property
    def settings(self) -> dict[str, JsonValue]:
        """What distinguishes runs at a glance."""
        parameters = self.run.config.reward.parameters
        return {
            **self.run.labels,
            **{f"reward.{name}": value for name, value in parameters.items()},
            "device": self.run.numerics.device_name,
            "dtype": self.run.numerics.dtype,
        }

    @property
    def places(self) -> dict[str, str]:
        """Where the run and what it made are."""
        config = self.run.config
        try:
            outputs = str(outputs_folder(config, self.run.run_id, self.run.uid))
        except (DdpoError, OSError, ValueError):  # a path of the machine that started it
            outputs = config.outputs
        tracking = config.tracking
        return {
            "store": self.run.store.root,
            "outputs": outputs,
            "mlflow": hide_credentials(tracking.uri),
            "mlflow_experiment": tracking.experiment,
        }

    def as_json(self) -> dict[str, Any]:
        """Return the run in JSON's types; the keys are those of every run."""
        fork = self.run.fork
        return {
            "run_id": self.run.run_id,
            "uid": self.run.uid,
            "state": self.state.word,
            "reason": self.state.reason,
            "epoch": self.state.epoch,
            "epochs": self.state.epochs,
            "parent": fork.parent_id if fork else None,
            "forked_at": fork.epoch if fork else None,
            "forks": self.forks,
            "places": self.places,
            "identity": self.identity,
            "operation": self.operation,
            "numerics": self.run.numerics.model_dump(mode="json"),
            "code": self.code,
            "curve": [_point(point) for point in self.curve],
        }


def overview(store: Store, run_id: str, known: Sequence[EpochRewards] = ()) -> Overview:
    """Return a run at a glance.

    Args:
        store: The store.
        run_id: The run's name.
        known: Its rewards by epoch, as far as they have been read before.

    Raises:
        RunNotFound: The store has no such run.
        DdpoError: It cannot be read.
    """
    record = load_run(store, run_id)
    starts = read_starts(store, run_id)
    last = starts.last.operation if starts.last else {}
    operation = last if isinstance(last, dict) else {}
    uid = starts.first.uid if starts.first else ""
    run = run_of_record(store, record, operation, starts.number or None, uid=uid)
    curve = trained_curve(run, known)
    return Overview(
        run=run,
        code=record.code,
        operation=operation,
        identity=record.identity,
        state=run_state(run, starts, run.first_epoch + len(curve)),
        curve=curve,
        forks=[keys.fork_of_record(key) for key in store.list(keys.forks_prefix(run_id))],
    )


@dataclass(frozen=True)
class RunDifference:
    """How two runs differ."""

    first: Overview
    """The first run."""
    second: Overview
    """The second run."""

    @property
    def settings(self) -> dict[str, tuple[Difference, ...]]:
        """What differs, by part: in each `Difference`, the first run's value is `stored`."""
        one, two = self.first, self.second
        return {
            "identity": differences(one.identity, two.identity),
            "operation": differences(one.operation, two.operation),
            "numerics": differences(
                one.run.numerics.model_dump(mode="json"), two.run.numerics.model_dump(mode="json")
            ),
            "code": differences(one.code, two.code),
        }

    @property
    def curves(self) -> list[tuple[int, float | None, float | None]]:
        """Each epoch with the mean rewards of both; None where there is none."""
        means = [
            {p.epoch: finite_mean(p) for p in each.curve} for each in (self.first, self.second)
        ]
        epochs = sorted(means[0].keys() | means[1].keys())
        return [(epoch, means[0].get(epoch), means[1].get(epoch)) for epoch in epochs]

    def as_json(self) -> dict[str, Any]:
        """Return the difference in JSON's types; values of settings are JSON themselves."""
        return {
            "runs": [self.first.run.run_id, self.second.run.run_id],
            **{
                part: [{"key": d.key, "values": [d.stored, d.wanted]} for d in found]
                for part, found in self.settings.items()
            },
            "curves": [{"epoch": epoch, "means": [one, two]} for epoch, one, two in self.curves],
        }


def finite_mean(point: EpochRewards) -> float | None:
    """Return the mean reward of an epoch; None if no sample has one."""
    return point.mean if math.isfinite(point.mean) else None


def chosen_rows(count: int, most: int = _ROWS) -> list[int]:
    """Return the rows of a long table that are shown: evenly spread, with the first and the last.

    Args:
        count: Number of rows.
        most: Number of rows that are shown at most.
    """
    if count <= most:
        return list(range(count))
    return [round(row * (count - 1) / (most - 1)) for row in range(most)]


def _point(point: EpochRewards) -> dict[str, Any]:
    return {
        "epoch": point.epoch,
        "mean": finite_mean(point),
        "std": point.std if math.isfinite(point.std) else None,
        "samples": point.samples,
        "failed": point.failed,
        "imputed": point.imputed,
    }
