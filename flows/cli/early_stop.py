"""Ctrl-C and SIGTERM while a command is still checking what it is about to run.

Separate from `signals`, which takes seconds to import: a stop may come before that.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ddpo_workflow.flows.cli.screen import say

_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class _Stopped(BaseException):
    """A signal has arrived; no library catches this as an error of its own."""


@contextmanager
def nothing_begun() -> Iterator[None]:
    """Say, if a signal stops the command within, that nothing has begun; until `leave`."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise _Stopped

    # Also where the shell ignores SIGINT, as it does for background jobs.
    handlers = {sign: signal.signal(sign, stop) for sign in _DEFAULTS}
    try:
        yield
    except BaseException:
        if not received:
            raise
        say("stopped before it began; nothing was written. Run the command again to start")
        sys.exit(128 + received[0])
    finally:
        for sign, handler in handlers.items():
            signal.signal(sign, handler)


def leave() -> None:
    """Leave the signals to others: something is about to begin."""
    for sign, handler in _DEFAULTS.items():
        signal.signal(sign, handler)
