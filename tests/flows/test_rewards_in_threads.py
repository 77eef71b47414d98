"""A run whose reward was not written for threads: each score is of its own sample's image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ddpo.basics.images import decode_image
from ddpo.runs import Run, start_run
from ddpo.store.kinds import ROLLOUTS, SCORES
from ddpo.store.manifests import Ref
from ddpo_workflow.tasks import worker
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from tests.fold import as_in_a_new_process
from tests.tiny import tiny_config

SHARDS = 4
OWN = """
import time
import numpy as np

built = []

class Brightness:
    def __init__(self):
        time.sleep(0.05)
        built.append(self)

    def __call__(self, images, prompts):
        self.images = images
        time.sleep(0.05)
        return [float(np.asarray(image).mean()) for image in self.images]
"""


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run of four shards, scored by a reward that keeps its batch in itself while it works."""
    (tmp_path / "own_batch_fixture.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_batch_fixture", None)
    as_in_a_new_process()
    config = tiny_config(
        tiny_model,
        storage={"root": str(tmp_path / "store")},
        reward={"name": "own_batch_fixture:Brightness"},
        rollouts={"samples_per_epoch": 4 * SHARDS, "shard_size": 4},
        sampler={"steps": 2},
    )
    yield start_run(config, "r")
    as_in_a_new_process()
    sys.modules.pop("own_batch_fixture", None)


def in_threads(calls: Sequence[Callable[[], object]]) -> list[object]:
    with ThreadPoolExecutor(SHARDS) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def test_each_score_is_of_its_own_samples_image(run: Run) -> None:
    first = start.fn(run.handle)
    rollouts = [sample_shard.fn(run.handle, first, 0, shard) for shard in range(SHARDS)]
    as_in_a_new_process()
    calls = [
        lambda ref=ref, shard=shard: score_shard.fn(run.handle, ref, 0, shard)
        for shard, ref in enumerate(rollouts)
    ]
    scores: list[Ref] = in_threads(calls)  # pyright: ignore[reportAssignmentType]
    for drawn, scored in zip(rollouts, scores, strict=True):
        images = [decode_image(row.image_png) for row in ROLLOUTS.load(run.store, drawn).rows()]
        expected = [float(np.float32(np.asarray(image).mean())) for image in images]
        assert [row.reward for row in SCORES.load(run.store, scored).rows()] == expected


def test_a_process_builds_one_reward_for_a_run_and_its_rescored_fork(run: Run) -> None:
    as_in_a_new_process()
    own = run.config.reward  # what a fork scores the epochs before it with
    calls = [lambda: worker.scorer_of(worker.opened(run.handle), own).reward] * SHARDS
    calls += [lambda: worker.scorer_of(worker.opened(run.handle), None).reward] * SHARDS
    first, *others = in_threads(calls)
    assert all(other is first for other in others)
    assert len(sys.modules["own_batch_fixture"].built) == 2  # one to start the run, one now
