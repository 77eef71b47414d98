"""What a flow's threads promise: order on the device, scoring beside it, nothing waited for."""

from __future__ import annotations

import threading

import pytest
from prefect import task

from ddpo_workflow.flows.flow import ddpo_flow
from ddpo_workflow.flows.laps import Laps
from ddpo_workflow.tasks.worker import ON_DEVICE

SHARDS = 6


@pytest.mark.slow
def test_device_tasks_run_in_order_while_others_run_beside_them() -> None:
    sampled: list[tuple[int, str]] = []
    first_is_scored = threading.Event()

    @task(tags=[ON_DEVICE])
    def sample(shard: int) -> int:
        if shard == 1:  # which ends only if the first is scored meanwhile
            assert first_is_scored.wait(600)
        sampled.append((shard, threading.current_thread().name))
        return shard

    @task
    def score(shard: int) -> int:
        first_is_scored.set()
        return shard * 10

    @ddpo_flow(name="test-threads", run_name="test")
    def collect() -> list[int]:
        samples = [sample.submit(shard) for shard in range(SHARDS)]
        scores = [score.submit(shard) for shard in samples]
        return [shard.result() for shard in scores]

    assert collect() == [10 * shard for shard in range(SHARDS)]
    assert [shard for shard, _ in sampled] == list(range(SHARDS))
    assert len({thread for _, thread in sampled}) == 1


def test_timings_are_those_of_the_stages_and_a_rate_over_three_of_them(monkeypatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0, 22.0, 30.0])
    monkeypatch.setattr("ddpo_workflow.flows.laps.time.monotonic", lambda: next(clock))
    laps = Laps()
    with laps("epoch"):
        for stage in ("sample", "score_wait", "update"):
            with laps(stage):
                pass
    assert laps.timings(samples=16) == {
        "sample_s": 2.0,
        "score_wait_s": 4.0,
        "update_s": 2.0,
        "epoch_s": 30.0,
        "images_per_s": 2.0,
    }
