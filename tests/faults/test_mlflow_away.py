"""MLflow's server ends in the middle of a run, which goes on, and catches up."""

from __future__ import annotations

import logging
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpo.basics import outages
from ddpo.runs import start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH
from ddpo_workflow.tasks.pictures import picture_set
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking import backlog
from ddpo_workflow.tasks.tracking.catch_up import track_missing
from ddpo_workflow.tasks.tracking.connection import TrackingUnavailable
from ddpo_workflow.tasks.tracking.page import open_page
from tests.faults.away import (
    ENGINES,
    EPOCHS,
    MANY_SHARDS,
    SHARDS,
    has_samples,
    wait_for_samples,
)
from tests.faults.crashes import RUN, Night
from tests.faults.processes import LIMIT_S, Command, kill
from tests.fold import as_in_a_new_process, run_epoch
from tests.servers import free_port, mlflow_server
from tests.sweeps import swept

AWAY_S = 60.0


@pytest.fixture
def plan(tiny_model: Path, tmp_path: Path, mlflow_database: Path) -> Callable[..., Night]:
    """Plans a run of three epochs that is shown at an address."""

    def of(uri: str, **changes: Any) -> Night:
        folder = tmp_path / "night"
        tracking = {"uri": uri, "pictures": {"prompts": ["a cat"], "seeds": [0]}}
        return Night.plan(
            tiny_model,
            str(folder / "store"),
            folder,
            mlflow_database,
            tracking=tracking,
            outputs=str(folder / "outputs"),
            **({"epochs": EPOCHS} | changes),
        )

    return of


@pytest.fixture
def served(tmp_path: Path, mlflow_database: Path) -> Path:
    """The folder of a server with an empty database."""
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(mlflow_database, folder / "mlflow.db")
    return folder


def check_all_is_shown(night: Night, epochs: int = EPOCHS) -> None:
    shown = night.metrics()
    for name in ("reward/mean", "update/loss", "total/samples"):
        assert [step for step, _ in shown[name]] == list(range(epochs)), name
    (images,) = [steps for name, steps in shown.items() if name.endswith(".webp")]
    assert {step for step, _ in images} >= set(range(epochs))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == outages.__name__]


def committed(night: Night) -> list[int]:
    return [e for e in range(EPOCHS) if EPOCH.exists(night.store, Partition(RUN, e))]


def test_the_run_goes_on_says_so_and_catches_up(
    plan: Callable[..., Night],
    served: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outages, "SILENT_S", 0.0)
    port = free_port()
    night = plan(f"http://127.0.0.1:{port}")
    with mlflow_server(served, port):
        as_in_a_new_process()
        run = start_run(night.config, RUN)
        page = open_page(run)
        checkpoint = run_epoch(run, start.fn(run.handle), 0, page.handle)
    with caplog.at_level(logging.WARNING):
        for epoch in range(1, EPOCHS):
            checkpoint = run_epoch(run, checkpoint, epoch, page.handle)
    assert committed(night) == list(range(EPOCHS))
    (line,) = said(caplog)
    assert f"MLflow at http://127.0.0.1:{port} is unavailable" in line
    assert "the run continues" in line and "waits for up to 10 minutes" in line
    with mlflow_server(served, port):
        page.backlog.finish()
        check_all_is_shown(night)
    assert said(caplog)[-1].endswith("answers again")


def test_what_a_process_could_not_log_is_logged_from_the_store_by_the_next(
    plan: Callable[..., Night], served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "PATIENCE_S", 1.0)
    port = free_port()
    night = plan(f"http://127.0.0.1:{port}")
    with mlflow_server(served, port):
        as_in_a_new_process()
        run = start_run(night.config, RUN)
        page = open_page(run)
    checkpoint = start.fn(run.handle)
    for epoch in range(EPOCHS):
        checkpoint = run_epoch(run, checkpoint, epoch, page.handle)
    with pytest.raises(TrackingUnavailable, match=r"Everything is in the store.*resume"):
        page.backlog.finish()
    with mlflow_server(served, port):
        as_in_a_new_process()
        resumed = start_run(night.config, RUN)
        page = open_page(resumed)
        pictures = picture_set(resumed, resumed.config.tracking.pictures)
        for _ in range(2):  # the second time, nothing is missing
            track_missing.fn(resumed.handle, page.handle, pictures, EPOCHS)
            check_all_is_shown(night)


@pytest.mark.parametrize("engine", swept(zip(ENGINES), often=lambda engine: engine == "local"))
def test_a_command_whose_server_is_killed_and_comes_back_ends_well(
    engine: str, plan: Callable[..., Night], served: Path, undisturbed: dict[str, bytes]
) -> None:
    port = free_port()
    night = plan(f"http://127.0.0.1:{port}", **MANY_SHARDS, engine=ENGINES[engine])
    command = Command(night, served.parent, {})
    with mlflow_server(served, port):
        process = command.start()
        try:
            wait_for_samples(command, process)
        except BaseException:
            kill(process)
            raise
    try:
        assert not has_samples(command, SHARDS - 1)
        time.sleep(AWAY_S)
        wait_for_epoch(night, EPOCHS - 1, process)
        assert process.poll() is None, command.log.read_text()
        with mlflow_server(served, port):
            assert process.wait(LIMIT_S) == 0, command.log.read_text()
            check_all_is_shown(night)
    finally:
        kill(process)
    screen = " ".join(command.log.read_text().split())
    assert f"MLflow at http://127.0.0.1:{port} is unavailable (" in screen
    assert f"MLflow at http://127.0.0.1:{port} answers again" in screen
    assert night.content() == undisturbed


def wait_for_epoch(night: Night, epoch: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until an epoch is committed."""
    deadline = time.monotonic() + LIMIT_S
    while epoch not in committed(night):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
