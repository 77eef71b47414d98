from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.away import MANY_SHARDS
from tests.faults.crashes import Night
from tests.faults.processes import Command
from tests.servers import free_port, prefect_server


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server that stays up: the environment of whoever uses it, not one of its own."""
    port = free_port()
    with prefect_server(tmp_path_factory.mktemp("prefect"), port):
        yield {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}


@pytest.fixture(scope="session")
def undisturbed(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a run of many shards stores in one process while all servers are there."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    outputs = str(folder / "outputs")
    store = str(folder / "store")
    night = Night.plan(tiny_model, store, folder, mlflow_database, **MANY_SHARDS, outputs=outputs)
    command = Command(night, folder, {})
    assert command.run() == 0, command.log.read_text()
    return night.content()
