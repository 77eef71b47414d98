"""The threads that a flow's tasks run in."""

from __future__ import annotations

import logging
import os
import threading
from types import TracebackType
from typing import Any

from prefect import Task
from prefect.context import FlowRunContext
from prefect.futures import PrefectConcurrentFuture
from prefect.task_runners import ThreadPoolTaskRunner

from ddpo.basics.children import ordinary_children
from ddpo_workflow.tasks.engines import current_engine
from ddpo_workflow.tasks.stops import is_stop
from ddpo_workflow.tasks.worker import ON_DEVICE

_EXIT_S = 10.0
"""How long a stopped flow run has at most until its process ends, in seconds."""
_LOG_S = 3.0
"""How long the process has to record how it ended once its outermost flow has, in seconds."""


class AbandoningThreads(ThreadPoolTaskRunner[Any]):
    """A thread pool that abandons its tasks once their flow is stopped.

    Prefect's own waits for them without a limit, for a reward that takes minutes, say. A task may
    be abandoned at any instant, since it commits all of its work at once.
    """

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._executor is not None and is_stop(exc_value):
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
            _end_process_within(_EXIT_S)
        super().__exit__(exc_type, exc_value, traceback)


class WorkerThreads(AbandoningThreads):
    """A thread pool with more threads for tasks that compute on a device, one per worker.

    Those start in the order in which they were submitted, as many at a time as the engine has
    workers. All others, such as scoring, run beside them.
    """

    def __init__(self, max_workers: int | None = None) -> None:
        super().__init__(max_workers)
        self._device: AbandoningThreads | None = None
        self._children = ordinary_children()  # user code may fork

    def submit(  # pyright: ignore[reportIncompatibleMethodOverride]  # its overloads are of async tasks
        self, task: Task[..., Any], parameters: dict[str, Any], *rest: Any, **named: Any
    ) -> PrefectConcurrentFuture[Any]:
        """Submit a task to the thread pool or, if it is tagged `ON_DEVICE`, to a worker's thread.

        Args:
            task: The task.
            parameters: Its arguments by name.
            rest: As in the base class.
            named: As in the base class.
        """
        if ON_DEVICE in task.tags:
            if self._device is None:  # by now the run's engine is known
                self._device = AbandoningThreads(max_workers=current_engine().workers)
                self._device.__enter__()
            return self._device.submit(task, parameters, *rest, **named)
        return super().submit(task, parameters, *rest, **named)

    def __enter__(self) -> WorkerThreads:
        self._children.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The workers' threads first: scoring may be waiting for samples of their queue.
        if self._device is not None:
            self._device.__exit__(exc_type, exc_value, traceback)
            self._device = None
        super().__exit__(exc_type, exc_value, traceback)
        self._children.__exit__(None, None, None)
        if is_stop(exc_value) and FlowRunContext.get() is None:
            _end_process_within(_LOG_S, flush=True)


def _end_process_within(seconds: float, *, flush: bool = False) -> None:
    """End the process of a Prefect worker's flow run, even if an abandoned task is still running.

    Python would wait for its thread, and the worker kills the process after half a minute, before
    which the flow run is not shown as cancelled.

    Args:
        seconds: From now.
        flush: Whether logs are sent to the server first, which may hang.
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:  # which the worker sets
        timer = threading.Timer(seconds, _end_process, args=[flush])
        timer.daemon = True
        timer.start()


def _end_process(flush: bool) -> None:
    if flush:
        for handler in logging.getLogger("prefect.flow_runs").handlers:
            handler.flush()
    os._exit(0)
