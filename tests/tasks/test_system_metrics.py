"""The system metrics of a run are logged by one thread, however often it is started."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from ddpo_workflow.tasks.tracking.system_metrics import SystemMetrics
from ddpo_workflow.tasks.tracking.tracker import RunTracker


def monitors() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


def test_a_server_that_is_back_before_the_thread_missed_it_gets_no_second_one(
    tmp_path: Path, mlflow_database: Path
) -> None:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    page = RunTracker.open(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        experiment="ddpo",
        run_id="night",
        uid="1a2b",
        params={},
        tags={},
    )
    metrics = SystemMetrics(page.handle.uri, page.mlflow_run_id, interval_s=600)
    before = monitors()
    metrics.start()
    metrics.start()  # as the thread that watches the server does after an outage
    assert len(monitors()) == len(before) + 1
    assert not page.steps("system/cpu_utilization_percentage")
    metrics.stop()
    assert monitors() == before
    assert page.steps("system/cpu_utilization_percentage") == {0}
