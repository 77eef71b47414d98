"""Prefect's server ends in the middle of a run, and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.away import ENGINES, MANY_SHARDS, SHARDS, has_samples, wait_for_samples
from tests.faults.crashes import Night
from tests.faults.processes import LIMIT_S, Command, kill
from tests.servers import free_port

AWAY_S = 20.0


@contextmanager
def prefect_server(folder: Path, port: int) -> Iterator[None]:
    """Run a Prefect server until the block ends."""
    environment = {**os.environ, "PREFECT_HOME": str(folder / "server")}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_outlives_an_outage_of_prefects_server(
    engine: str,
    tiny_model: Path,
    tmp_path: Path,
    mlflow_database: Path,
    undisturbed: dict[str, bytes],
) -> None:
    port = free_port()
    night = Night.plan(
        tiny_model,
        str(tmp_path / "night" / "store"),
        tmp_path / "night",
        mlflow_database,
        **MANY_SHARDS,
        engine=ENGINES[engine],
        outputs=str(tmp_path / "outputs"),
    )
    command = Command(night, tmp_path, {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"})
    with prefect_server(tmp_path, port):
        process = command.start()
        try:
            wait_for_samples(command, process)
        except BaseException:
            kill(process)
            raise
    try:
        assert not has_samples(command, SHARDS - 1)
        time.sleep(AWAY_S)
        assert process.poll() is None, command.log.read_text()
        with prefect_server(tmp_path, port):
            assert process.wait(LIMIT_S) == 0, command.log.read_text()
    finally:
        kill(process)
    screen = " ".join(command.log.read_text().split())
    assert f"Prefect's server at http://127.0.0.1:{port}/api is unavailable (" in screen
    assert night.content() == undisturbed
