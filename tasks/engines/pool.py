"""An engine of several workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import partial
from queue import PriorityQueue
from threading import Lock
from typing import Any, ParamSpec, TypeVar

from ddpo.errors import DdpoError
from ddpo_workflow.tasks.engines.base import Seat, Worker, WorkerLost

P = ParamSpec("P")
R = TypeVar("R")

_CALLS = 3
"""How often a function is called whose worker is lost each time."""
_GRACE_S = 20.0
"""How long the other ranks have to end by themselves once one has failed, in seconds."""

_logger = logging.getLogger(__name__)


class Pool:
    """Gives each call to an idle worker.

    Of several, the first one is taken, so that an update finds the weights that it left there, and
    those that were lost before come last: their node may be gone.

    Args:
        workers: The workers.
        meeting: Opens a place where the ranks of one computation meet, and yields its address.
    """

    def __init__(
        self, workers: Sequence[Worker], meeting: Callable[[], AbstractContextManager[str]]
    ) -> None:
        self._workers = workers
        self._meeting = meeting
        self._closed = False
        self._all = Lock()
        self._losses = [0] * len(workers)
        self._idle: PriorityQueue[tuple[int, int]] = PriorityQueue()
        for number in range(len(workers)):
            self._release(number)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function on an idle worker; see `Engine.call`."""

        def once() -> R:
            _, number = self._idle.get()
            try:
                return self._workers[number].run(partial(function, *args, **kwargs))
            except WorkerLost:
                self._losses[number] += 1
                raise
            finally:
                self._release(number)

        return self._until_kept(once)

    def together(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function on all workers at once; see `Engine.together`."""

        def once() -> R:
            with self._all:  # two that each wait for the other's workers would wait forever
                numbers = [self._idle.get()[1] for _ in self._workers]
            try:
                with self._meeting() as address:
                    seats = [Seat(rank, len(numbers), address) for rank in range(len(numbers))]
                    return self._gathered([partial(function, seat, *args) for seat in seats])
            finally:
                for number in numbers:
                    self._release(number)

        return self._until_kept(once)

    def _release(self, number: int) -> None:
        self._idle.put((self._losses[number], number))

    def _gathered(self, calls: Sequence[Callable[[], R]]) -> R:
        """Run one call on each worker; once one has failed, the others end as well."""
        with ThreadPoolExecutor(len(calls)) as threads:
            running: list[Future[R]] = [
                # Each in this context, whose flow run the log belongs to.
                threads.submit(copy_context().run, worker.run, call)
                for worker, call in zip(self._workers, calls, strict=True)
            ]
            wait(running, return_when=FIRST_EXCEPTION)
            late = wait(running, timeout=_GRACE_S).not_done  # none unless one has failed
            for worker, each in zip(self._workers, running, strict=True):
                if each in late:
                    worker.end()
        errors = [error for each in running if (error := each.exception())]
        # A lost worker is why the others' connections broke; so is an error of the project.
        for kind in (WorkerLost, DdpoError, Exception):
            for error in errors:
                if isinstance(error, kind):
                    raise error
        return running[0].result()

    def _until_kept(self, once: Callable[[], R]) -> R:
        for left in reversed(range(_CALLS)):
            try:
                return once()
            except WorkerLost as error:
                if not left or self._closed:
                    raise
                _logger.warning(
                    "%s was lost; its task starts again: %s", error.worker, error.reason
                )
        raise AssertionError("the last call returns or raises")

    def close(self) -> None:
        """End all workers."""
        self._closed = True
        for worker in self._workers:
            worker.close()
