"""Say on the screen that a service is unavailable, what waits for it and until when."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TypeVar

_logger = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long a run waits for a service that is unavailable."""
SILENT_S = 3.0
"""Shorter outages are not worth a line."""
_FIRST_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT_S = 10.0

T = TypeVar("T")


def clock(seconds: float) -> str:
    """Return the time of day in so many seconds, as 23:59:59."""
    return f"{datetime.now() + timedelta(seconds=seconds):%H:%M:%S}"


class Outage:
    """Whether a service is unavailable; says so once per outage, and once that it answers again.

    Args:
        what: The service, with its address: the beginning of a sentence.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._lock = threading.Lock()
        self._began: float | None = None
        self._said = False

    def goes_on(self, reason: str, plan: str, *, silent_s: float | None = None) -> None:
        """Say that the service is unavailable, unless it was already said or the outage is short.

        Args:
            reason: What its last call failed with.
            plan: What is waited for, and until when.
            silent_s: Outages shorter than this are not mentioned; by default `SILENT_S`.
        """
        with self._lock:
            now = time.monotonic()
            began = self._began = now if self._began is None else self._began
            silent_s = SILENT_S if silent_s is None else silent_s
            if self._said or now - began < silent_s:
                return
            self._said = True
        _logger.warning("%s is unavailable (%s); %s", self.what, reason, plan)

    def ends(self) -> None:
        """Say that the service answers again, if its outage was mentioned."""
        with self._lock:
            said, self._said, self._began = self._said, False, None
        if said:
            _logger.warning("%s answers again", self.what)


def patiently(
    call: Callable[[], T],
    unavailable: type[Exception],
    outage: Outage,
    seconds: float,
    *,
    slow_after_s: float | None = None,
) -> T:
    """Call, and while the service is unavailable, wait and call again.

    Args:
        call: What may be called again.
        unavailable: What it raises while the service is unavailable.
        outage: Says so.
        seconds: How long to wait in all; 0 for a single call without any message.
        slow_after_s: How soon a call should have answered, if that is known.

    Raises:
        Exception: What the last call raised.
    """
    if not seconds:
        return call()
    deadline = time.monotonic() + seconds
    plan = f"waiting for it until {clock(seconds)}"
    for wait_s in itertools.chain(_FIRST_WAITS_S, itertools.repeat(_LONGEST_WAIT_S)):
        try:
            with _said_if_slow(outage, slow_after_s, plan):
                result = call()
        except unavailable as error:
            if time.monotonic() + wait_s > deadline:
                raise
            outage.goes_on(str(getattr(error, "reason", error)), plan)
            time.sleep(wait_s)
        except Exception:
            outage.ends()  # a refusal is an answer too
            raise
        else:
            outage.ends()
            return result
    raise AssertionError("the waits have no end")


@contextmanager
def _said_if_slow(outage: Outage, after_s: float | None, plan: str) -> Iterator[None]:
    if after_s is None:
        yield
        return
    reason = f"no answer for {after_s:g} s"
    timer = threading.Timer(after_s, outage.goes_on, [reason, plan], {"silent_s": 0.0})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
