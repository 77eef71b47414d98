"""A shard is scored while the next one is drawn, or while the model is trained."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ddpo_workflow.tasks.sample
import ddpo_workflow.tasks.update
from ddpo_workflow.flows.train import train
from ddpo_workflow.tasks.tracking.tracker import tracker
from tests.tiny import tiny_config

SHARDS = 10
LIMIT_S = 600.0
"""Nothing here takes long: whoever waits for so long waits for something that does not come."""


class Meetings:
    """Sampling and scoring that wait for each other, whatever the speed of the machine.

    A shard's scoring ends only once the next shard's sampling has begun, and that one ends only
    once the shard before is being scored, and the one before that has been. One after the other,
    neither would ever end; and no more than the last shard is left to score in the end.
    """

    def __init__(self) -> None:
        self.sampling, self.scoring, self.scored = (
            [threading.Event() for _ in range(SHARDS)] for _ in range(3)
        )
        self.samplings, self.scorings = itertools.count(), itertools.count()

    def sample(self) -> None:
        shard = next(self.samplings)
        self.sampling[shard].set()
        if shard >= 1:
            assert self.scoring[shard - 1].wait(LIMIT_S), "scoring waits for sampling to end"
        if shard >= 2:
            assert self.scored[shard - 2].wait(LIMIT_S), "scoring falls behind"

    def score(self) -> None:
        shard = next(self.scorings)
        self.scoring[shard].set()
        if shard + 1 < SHARDS:
            assert self.sampling[shard + 1].wait(LIMIT_S), "sampling waits for scoring to end"
        self.scored[shard].set()


meetings = Meetings()


def meeting(images: Sequence[Image.Image], prompts: Sequence[Any]) -> list[float]:
    """A reward that takes as long as sampling the next shard."""
    if threading.current_thread().name != "trial":  # asked before the run, with nothing sampled
        meetings.score()
    return [float(index) for index in range(len(images))]


def run_with(model: Path, folder: Path, mlflow_database: Path, reward: Any, **changes: Any) -> None:
    """Train a run with batches of two and a reward of this module."""
    tracker.cache_clear()
    database = shutil.copy(mlflow_database, folder / "mlflow.db")
    config = tiny_config(
        model,
        sampler={"steps": 2},
        numerics={"sample_batch_size": 2, "micro_batch_size": 2},
        reward={"name": f"{__name__}:{reward.__name__}"},
        storage={"root": str(folder / "store")},
        tracking={"uri": f"sqlite:///{database}", "pictures": {"prompts": ["a cat"]}},
        outputs=str(folder / "outputs"),
        **changes,
    )
    file = folder / "config.yaml"
    file.write_text(config.model_dump_json())
    train(str(file), run_id="overlap")


@pytest.mark.slow
def test_a_reward_as_slow_as_sampling_adds_a_fifth_at_most(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = ddpo_workflow.tasks.sample.sample

    def drawn(*arguments: Any, **named: Any) -> Any:
        meetings.sample()
        return draw(*arguments, **named)

    monkeypatch.setattr(ddpo_workflow.tasks.sample, "sample", drawn)
    run_with(
        tiny_model,
        tmp_path,
        mlflow_database,
        meeting,
        rollouts={"samples_per_epoch": 2 * SHARDS, "shard_size": 2},
        epochs=1,
    )
    assert all(shard.is_set() for shard in meetings.scored)


class Ahead:
    """Scoring of the second epoch, and the update of the first, that wait for each other."""

    def __init__(self) -> None:
        self.scoring, self.updating = threading.Event(), threading.Event()
        self.scorings = itertools.count()

    def score(self) -> None:
        if next(self.scorings) == 1:  # the second epoch's only shard
            self.scoring.set()
            assert self.updating.wait(LIMIT_S), "the update waits for the next epoch's scores"

    def update(self) -> None:
        self.updating.set()
        assert self.scoring.wait(LIMIT_S), "scoring of the next epoch waits for the update"


ahead = Ahead()


def meeting_the_update(images: Sequence[Image.Image], prompts: Sequence[Any]) -> list[float]:
    """A reward that scores an epoch while the one before it is trained on."""
    if threading.current_thread().name != "trial":
        ahead.score()
    return [float(index) for index in range(len(images))]


@pytest.mark.slow
def test_an_epoch_that_is_sampled_ahead_is_scored_while_the_model_is_trained(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ddpo_workflow.tasks.update.update

    def updated(*arguments: Any, **named: Any) -> Any:
        ahead.update()
        return right(*arguments, **named)

    monkeypatch.setattr(ddpo_workflow.tasks.update, "update", updated)
    run_with(
        tiny_model,
        tmp_path,
        mlflow_database,
        meeting_the_update,
        rollouts={"samples_per_epoch": 2, "shard_size": 2, "sample_ahead": True},
        algorithm={"updates_per_epoch": 1},
        epochs=2,
    )
    assert next(ahead.scorings) == 2
