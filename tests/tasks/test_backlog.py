"""What MLflow missed is shown in the end, or the run does not end as finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from ddpo.errors import DdpoError, StoreCallFailed
from ddpo_workflow.tasks.tracking import backlog
from ddpo_workflow.tasks.tracking.tracker import RunTracker, TrackingError

Job = Callable[[], None]


@pytest.fixture
def page(tmp_path: Path, mlflow_database: Path) -> RunTracker:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return RunTracker.open(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        experiment="ddpo",
        run_id="night",
        uid="1a2b",
        params={},
        tags={},
    )


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the next health check finds no server; empty for one that answers."""
    reasons: list[str] = []

    def why(uri: str, *, within_s: float = 0.0) -> str:
        return "".join(reasons)

    monkeypatch.setattr(backlog, "why_unavailable", why)
    return reasons


def go_away(page: RunTracker, health: list[str]) -> None:
    health.append("ConnectionError")
    page.backlog.beat()


def failing(job: Job, *errors: DdpoError) -> Job:
    """Return a job that first raises each of these once."""
    left = list(errors)

    def run() -> None:
        if left:
            raise left.pop(0)
        job()

    return run


def metric(page: RunTracker, step: int) -> Job:
    return lambda: page.log_metrics({"loss": float(step)}, step)


def steps(page: RunTracker) -> list[int]:
    uri = page.handle.uri
    return [m.step for m in MlflowClient(uri).get_metric_history(page.mlflow_run_id, "loss")]


def test_what_fails_when_the_server_is_back_is_logged_by_the_next(
    page: RunTracker, health: list[str]
) -> None:
    go_away(page, health)
    page.backlog.log(failing(metric(page, 0), TrackingError("status 500")))
    health.clear()
    with pytest.raises(TrackingError, match="500"):  # a warning of the thread that watches
        page.backlog.beat()
    page.backlog.log(metric(page, 1))
    assert steps(page) == [0, 1]


def test_a_task_that_meets_the_failure_of_another_loses_neither(
    page: RunTracker, health: list[str]
) -> None:
    go_away(page, health)
    unread = StoreCallFailed("read", "k", "file:///store", "EIO", "Look at the disk")
    page.backlog.log(failing(metric(page, 0), unread, unread))
    page.backlog.log(metric(page, 1))
    health.clear()
    with pytest.raises(StoreCallFailed):
        page.backlog.beat()
    with pytest.raises(StoreCallFailed):
        page.backlog.log(metric(page, 2))
    page.backlog.log(metric(page, 2))  # as a retry of its task does
    page.backlog.finish()
    assert steps(page) == [0, 1, 2]


def test_what_its_own_task_was_refused_is_left_to_that_task(page: RunTracker) -> None:
    with pytest.raises(TrackingError, match="refused"):
        page.backlog.log(failing(metric(page, 0), TrackingError("refused")))
    page.backlog.finish()
    assert steps(page) == []


def test_a_page_that_does_not_show_all_is_not_finished(page: RunTracker, health: list[str]) -> None:
    refused = [TrackingError("refused")] * 2
    with pytest.raises(TrackingError, match="refused"), page:
        go_away(page, health)
        page.backlog.log(failing(metric(page, 0), *refused))
        health.clear()
        with pytest.raises(TrackingError):
            page.backlog.beat()
    client = MlflowClient(page.handle.uri)
    assert client.get_run(page.mlflow_run_id).info.status == "FAILED"
