"""Warnings of this project are in the log of the flow run in which they occur."""

from __future__ import annotations

import logging
import time
from uuid import UUID

import pytest
from prefect import task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.runtime import flow_run

from ddpo_workflow.flows.flow import ddpo_flow


@task
def works() -> None:
    logging.getLogger("ddpo.rewards.anything").warning("in a task")


@ddpo_flow(name="warns", run_name="warns")
def warns() -> str:
    logging.getLogger("ddpo_workflow.tasks.anything").warning("in a flow")
    logging.getLogger("ddpo.store.anything").info("only said")
    logging.getLogger("elsewhere").warning("of another library")
    works.submit().result()
    return str(flow_run.get_id())


@pytest.mark.slow
def test_warnings_of_flows_and_tasks_are_in_the_log_of_the_flow_run() -> None:
    logging.getLogger("ddpo.store.anything").warning("outside of any run")
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(warns())]))
    ours = ("ddpo.", "ddpo_workflow.", "elsewhere")
    logged: list[str] = []
    deadline = time.monotonic() + 120
    with get_client(sync_client=True) as client:
        while len(logged) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)  # logs are sent in batches
            found = client.read_logs(chosen)
            logged = [entry.message for entry in found if entry.name.startswith(ours)]
    assert sorted(logged) == ["in a flow", "in a task"]
