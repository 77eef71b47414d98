"""Warnings are in the log of the flow run in which they occur, whoever gives them."""

from __future__ import annotations

import logging
import time
from uuid import UUID

import pytest
from prefect import get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.runtime import flow_run

from ddpo.config import ProcessesEngine, RayEngine
from ddpo_workflow.flows.flow import ddpo_flow
from ddpo_workflow.tasks.engines.base import Engine
from ddpo_workflow.tasks.engines.local import Local
from ddpo_workflow.tasks.engines.processes import process_pool
from ddpo_workflow.tasks.engines.ray_actors import ray_pool
from tests.calls import warn_of_everything

WARNINGS = [
    "a library's",
    "that of diffusers",
    "that of mlflow",
    "that of transformers",
    "this project's",
]
ENGINES = {
    "local": Local,
    "processes": lambda: process_pool(ProcessesEngine(type="processes", workers=1), "cpu", ()),
    "ray": lambda: ray_pool(RayEngine(type="ray", workers=1), "cpu", ()),
}


@task
def works(engine: str) -> None:
    computes: Engine = ENGINES[engine]()
    try:
        computes.call(warn_of_everything)
    finally:
        computes.close()


@ddpo_flow(name="warns", run_name="warns")
def warns(engine: str) -> str:
    works.submit(engine).result()
    logging.getLogger("ddpo_workflow.tasks.anything").warning("in the flow")
    get_run_logger().warning("by Prefect")
    return str(flow_run.get_id())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("always:Python's")
def test_warnings_are_in_the_log_of_the_flow_run(engine: str) -> None:
    logging.getLogger("ddpo.store.anything").warning("outside of any run")
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(warns(engine))]))
    logged: list[tuple[str, str]] = []
    deadline = time.monotonic() + 120
    with get_client(sync_client=True) as client:
        while ("prefect.flow_runs", "by Prefect") not in logged and time.monotonic() < deadline:
            time.sleep(0.2)  # logs are sent in batches
            logged = [(log.name, log.message) for log in client.read_logs(chosen)]
    plain = [text for name, text in logged if name != "python" and "hook" not in text.lower()]
    said = ("in the flow", "by Prefect", *WARNINGS)
    assert sorted(text for text in plain if text in said) == sorted(said)
    assert not any("not said" in text or "outside" in text for text in plain)
    (python,) = [text for name, text in logged if name == "python"]
    assert "UserWarning: Python's" in python
