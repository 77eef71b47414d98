"""Prefect hooks that mark every flow run of a stopped process as cancelled.

Prefect treats a flow run that a signal ends as crashed. Artefacts are committed whole or not at
all, so a stopped run has neither crashed nor failed: it can be resumed.
"""

from __future__ import annotations

import logging
import sys
from typing import Any
from uuid import UUID

from prefect import Flow, State
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled

from ddpo_workflow.tasks.stops import recognise_stop

_latest: dict[str, UUID] = {}
"""The newest flow run of each flow in this process, by the flow's name."""


def remember_flow_run(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Remember a flow run that starts; for ``on_running``."""
    _latest[flow.name] = flow_run.id


def mark_cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Mark a flow run as cancelled if a stop ended it; for ``on_crashed`` and ``on_failure``."""
    if not recognise_stop(sys.exception()):  # the exception that Prefect is handling in this call
        return
    _cancel(flow_run.id)
    if flow_run.parent_task_run_id is None:
        # Without the command line, Prefect ends the process next, by the signal's default action.
        for handler in logging.getLogger("prefect.flow_runs").handlers:
            handler.flush()


def cancel_unfinished() -> None:
    """Mark the flow runs of this process that have not finished as cancelled."""
    with get_client(sync_client=True) as client:
        states = {run_id: client.read_flow_run(run_id).state for run_id in _latest.values()}
    for run_id, state in states.items():
        if state is None or not (state.is_completed() or state.is_cancelled()):
            _cancel(run_id)


def _cancel(flow_run_id: UUID) -> None:
    message = (
        "Stopped by a signal. Committed work is kept: continue with `ddpo resume`, or with the "
        "`ddpo compare` command that was stopped"
    )
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelled(message=message), force=True)
