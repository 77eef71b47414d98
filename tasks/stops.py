"""Recognise a stop: whether Ctrl-C or SIGTERM is what ends a flow."""

from __future__ import annotations

import threading

from prefect.exceptions import TerminationSignal

_STOPS = (KeyboardInterrupt, TerminationSignal)

stopping = threading.Event()
"""Set once a stop has been recognised; from then on further signals must not raise."""


def is_stop(error: BaseException | None) -> bool:
    """Return whether an error was caused by Ctrl-C or SIGTERM.

    A signal may raise anywhere inside Prefect, whose own clean-up may then fail with another error.
    """
    while error is not None and not isinstance(error, _STOPS):
        error = error.__context__
    return error is not None


def recognise_stop(error: BaseException | None) -> bool:
    """Return whether an error was caused by a stop; if so, let no further signal interrupt it."""
    if is_stop(error):
        stopping.set()
    return is_stop(error)
