"""Prefect's server ends in the middle of a run, and comes back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.away import ENGINES, MANY_SHARDS, SHARDS, has_samples, wait_for_samples
from tests.faults.crashes import Night
from tests.faults.processes import LIMIT_S, Command, kill
from tests.servers import free_port, prefect_server
from tests.sweeps import swept

AWAY_S = 20.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", swept(zip(ENGINES), often=lambda engine: engine == "local"))
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
