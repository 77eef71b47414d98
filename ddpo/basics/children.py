"""Processes that a library forks, such as a pool in a reward, do not inherit signal handling."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STOPS = {signal.SIGINT, signal.SIGTERM}


class _Forking(threading.local):
    mask: set[int] | None = None
    """The signals that the forking thread had blocked; None outside of `ordinary_children`."""


_forking = _Forking()
_uses = 0
_registered = False


@contextmanager
def ordinary_children() -> Iterator[None]:
    """Let processes that are forked within handle SIGINT and SIGTERM as any new process does.

    A child inherits its parent's handlers, and the socket by which signals wake the parent: the
    SIGTERM that ends a pool's workers would be mistaken for one to the parent, or be ignored.
    """
    global _uses, _registered
    if not _registered:  # once, since it cannot be undone
        _registered = True
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
    _uses += 1
    try:
        yield
    finally:
        _uses -= 1


def _hold() -> None:
    """Let signals wait until the child has forgotten its parent's handlers."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS) if _uses else None


def _release() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _forget() -> None:
    if _forking.mask is None:
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _release()
