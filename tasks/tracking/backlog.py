"""What is still to be logged to a page: a run does not wait for it until all else is done.

MLflow may be unavailable for a while. What cannot be logged then is logged in order once it answers
again; if the process ends first, the next one logs it from the store (see `catch_up`), but for
adapters and the times and system metrics of that process.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache

from ddpo.basics.outages import PATIENCE_S, Outage, clock
from ddpo.basics.redaction import hide_credentials
from ddpo_workflow.tasks.tracking.connection import (
    TrackingHandle,
    TrackingUnavailable,
    why_unavailable,
)

_BEAT_TIMEOUT_S = 3.0
_NEXT_TRY_S = 1.0


class Backlog:
    """What is still to be logged to a page, in order. Safe to use from several threads."""

    def __init__(self, handle: TrackingHandle) -> None:
        self._uri = handle.uri
        self._jobs: deque[Callable[[], object]] = deque()
        self._lock = threading.RLock()
        self._away = False
        self._outage = Outage(f"MLflow at {hide_credentials(handle.uri)}")

    def log(self, job: Callable[[], object]) -> None:
        """Log something now, or later if MLflow is unavailable.

        Args:
            job: Logs it; may be called more than once.

        Raises:
            DdpoError: It cannot be logged, or what was due before it; the latter stays due. The
                caller may log it again.
        """
        with self._lock:
            self._jobs.append(job)
            try:
                self.catch_up()
            except BaseException:
                self._jobs.pop()  # the job: its caller knows that it is not logged
                raise

    def catch_up(self) -> bool:
        """Log what is due; return whether nothing is left.

        Raises:
            DdpoError: Something cannot be logged, and stays due.
        """
        with self._lock:
            while self._jobs and not self._away:
                try:
                    self._jobs[0]()
                except TrackingUnavailable as error:
                    self._say(error.reason)
                    return False
                self._jobs.popleft()
                self._outage.ends()
            return not self._jobs

    def finish(self) -> None:
        """Log what is left, and wait for MLflow if it is unavailable.

        Raises:
            TrackingUnavailable: It stayed so.
            DdpoError: Something cannot be logged.
        """
        deadline = time.monotonic() + PATIENCE_S
        plan = f"waiting for it until {clock(PATIENCE_S)}"
        last = Outage(self._outage.what)
        while not self.catch_up():
            reason = why_unavailable(self._uri) or f"{len(self._jobs)} entries are not logged yet"
            last.goes_on(reason, plan, silent_s=0.0)
            if time.monotonic() > deadline:
                raise TrackingUnavailable(
                    f"{self._outage.what} was unavailable for {PATIENCE_S / 60:g} minutes after "
                    "the last epoch. Everything is in the store; once MLflow answers, resume the "
                    "run to log the rest, except for adapters of earlier epochs",
                    reason,
                )
            time.sleep(_NEXT_TRY_S)
            self._away = bool(self._away and why_unavailable(self._uri))
        last.ends()

    def beat(self) -> bool:
        """Check whether the server answers; say so if it does not, and catch up once it does.

        Returns:
            Whether it answers again.

        Raises:
            DdpoError: As `catch_up`.
        """
        reason = why_unavailable(self._uri, within_s=_BEAT_TIMEOUT_S)
        was_away, self._away = self._away, bool(reason)
        if reason:
            self._say(reason)
        elif was_away:
            self._outage.ends()
            self.catch_up()
        return was_away and not reason

    def _say(self, reason: str) -> None:
        minutes = f"{PATIENCE_S / 60:g} minutes"
        self._outage.goes_on(
            reason,
            "the run continues and catches up once it answers; after the last epoch it waits for "
            f"up to {minutes}",
        )


@cache
def backlog(handle: TrackingHandle) -> Backlog:
    """Return the backlog of a page, one in a process."""
    return Backlog(handle)
