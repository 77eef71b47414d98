"""The service that scores a run is killed, and started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from tests.faults.crashes import RUN, Night
from tests.faults.processes import Command, kill
from tests.servers import free_port

LIMIT_S = 900
AWAY_S = 3.0

SLOW = """
import time
import numpy as np
def slow(images, prompts):
    time.sleep(0.5 * len(images))
    return [float(np.asarray(image).astype(float).mean()) for image in images]
"""


@contextmanager
def served(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`ddpo serve-reward` on a port, until the block ends."""
    (folder / "slow_reward.py").write_text(SLOW)
    with (folder / "service.log").open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ddpo_workflow.flows.cli",
                "serve-reward",
                "slow_reward:slow",
                f"--port={port}",
            ],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill(process)


@pytest.mark.slow
def test_a_reward_service_killed_in_the_midst_of_a_run_costs_a_delay_only(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path
) -> None:
    port = free_port()
    parameters = {
        "endpoints": [f"http://127.0.0.1:{port}"],
        "max_batch": 1,
        "retries": 10_000,
        "give_up_after_s": LIMIT_S,
    }
    undisturbed, disturbed = (
        Night.plan(
            tiny_model,
            str(tmp_path / name / "store"),
            tmp_path / name,
            mlflow_database,
            reward={"name": "http", "parameters": parameters},
            storage={"root": str(tmp_path / name / "store")},
        )
        for name in ("undisturbed", "disturbed")
    )
    command = Command(disturbed, tmp_path / "disturbed", {})
    with served(tmp_path, port) as service:
        undisturbed.go()
        process = command.start()
        try:
            wait_for_epoch_1(disturbed, process)
            kill(service)
            rows = scored(disturbed)
            time.sleep(AWAY_S)
            assert process.poll() is None, command.log.read_text()
            assert scored(disturbed) == rows, "the service is away; nothing can be scored"
            with served(tmp_path, port):
                assert process.wait(LIMIT_S) == 0, command.log.read_text()
        finally:
            kill(process)
    # The command draws the last checkpoint's pictures too, and measures its time.
    assert undisturbed.content().items() <= disturbed.content().items()
    shown = disturbed.metrics()
    for name, values in undisturbed.metrics().items():
        assert set(values) <= set(shown[name]), name
        assert name.startswith("images/") or values == shown[name], name


def wait_for_epoch_1(night: Night, process: subprocess.Popen[bytes]) -> None:
    """Wait until a shard of epoch 1 is drawn, which takes a second to be scored."""
    deadline = time.monotonic() + LIMIT_S
    while not night.store.exists(ROLLOUTS.key(Partition(RUN, 1, 0))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def scored(night: Night) -> int:
    """Return how many shards have their scores."""
    return len(night.store.list("manifests/rewards"))
