"""The decorator of every flow here, and the settings that its runs share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from prefect import Flow, State, flow
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from ddpo.basics.loopback import never_proxy_loopback
from ddpo_workflow.flows.hooks import mark_cancelled, remember_flow_run
from ddpo_workflow.flows.logs import log_to_flow_runs
from ddpo_workflow.flows.threads import WorkerThreads

never_proxy_loopback()  # on a worker, too

P = ParamSpec("P")
R = TypeVar("R")

_THREADS = 4


def ddpo_flow(
    *, name: str, run_name: str | Callable[[], str]
) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a flow that ends as cancelled when it is stopped, and whose tasks may run in threads.

    Args:
        name: The flow's name.
        run_name: The name of its runs, or a template of one over the flow's parameters.
    """
    return flow(  # pyright: ignore[reportCallIssue]  # task runners are typed by what tasks return
        name=name,
        flow_run_name=run_name,
        task_runner=WorkerThreads(max_workers=_THREADS),  # pyright: ignore[reportArgumentType]
        on_running=[_begin],
        on_crashed=[mark_cancelled],
        on_failure=[mark_cancelled],
    )


def _begin(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prepare this process for a flow run; a hook for ``on_running``."""
    log_to_flow_runs()  # now: an import of MLflow replaces the handlers of its logger
    remember_flow_run(flow, flow_run, state)


@contextmanager
def without_heartbeats() -> Iterator[None]:
    """Run flows without heartbeats, whose threads delay the end of each by up to 1 s.

    Heartbeats tell a server that a flow's process is alive. A frequency set by the user is kept.
    """
    with temporary_settings(set_defaults={PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def artifact_key(name: str, uid: str) -> str:
    """Return what the keys of a run's artifacts in Prefect begin with.

    Prefect allows lower case, digits and dashes, so that many names have the same form.

    Args:
        name: The run's name.
        uid: What sets it apart from others of its name.
    """
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{uid[:8]}"
