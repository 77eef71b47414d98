"""Ctrl-C and SIGTERM: one clean end, within ten seconds.

The signal raises in the main thread. On the way out the MLflow run is ended as killed, and hooks
mark each flow run as cancelled. All of that should be quick, and any of it may hang: `StopHandler`
watches from a separate thread and ends the process if necessary. Work is committed atomically, so a
task may be abandoned at any instant.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

import psutil

from ddpo.basics.children import ordinary_children
from ddpo_workflow.flows.hooks import cancel_unfinished
from ddpo_workflow.tasks.stops import is_stop, recognise_stop, stopping

_GRACE_S = 6.0
_RESEND_S = 1.0
_CANCEL_S = 1.5
_MESSAGE_S = 0.5
_DUPLICATE_S = 1.0  # `timeout`, `make` and `uv run` forward a Ctrl-C that the terminal sent already


class StopHandler:
    """A context in which the first Ctrl-C or SIGTERM ends the process, cleanly and soon.

    The exit status is 130 after Ctrl-C and 143 after SIGTERM, as a shell would report it. A second
    Ctrl-C ends the process at once.
    """

    def __init__(self, show_message: Callable[[], None]) -> None:
        """Prepare the context; nothing is installed until it is entered.

        Args:
            show_message: Tells the user how to resume. Called once, at the end of a stop, possibly
                from another thread.
        """
        self._show_message = show_message
        self._message_shown = False
        self._number = int(signal.SIGINT)
        self._received = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._children = ordinary_children()

    def __enter__(self) -> None:
        self._children.__enter__()
        # Python writes the number of every signal here, whichever handler is installed and whatever
        # the main thread is doing.
        self._writer.setblocking(False)
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        stopping.clear()
        sys.unraisablehook = _ignore_lost_stop
        # Also where the shell ignores SIGINT, as it does for background jobs.
        self._handlers = {
            sign: signal.signal(sign, _raise) for sign in (signal.SIGINT, signal.SIGTERM)
        }
        threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The error may be a different one, such as of a server that the same signal has ended.
        if recognise_stop(error) or (error is not None and self._received.is_set()):
            self._received.wait(1.0)
            self._finish()
            # A last garbage collection would take seconds, with no watcher left.
            gc.disable()
            gc.freeze()
            sys.exit(128 + self._number)
        sys.unraisablehook = sys.__unraisablehook__
        signal.set_wakeup_fd(self._wakeup_fd)
        for sign, handler in self._handlers.items():
            signal.signal(sign, handler)
        self._writer.close()
        self._children.__exit__(None, None, None)

    def _next_signal(self) -> int:
        """Return the number of the next stop signal; 0 once the context is left."""
        while number := self._reader.recv(1):  # other libraries handle other signals
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                return number[0]
        return 0

    def _watch(self) -> None:
        number = self._next_signal()
        if not number:
            return
        self._number = number
        self._received.set()
        received = time.monotonic()
        while (left := received + _GRACE_S - time.monotonic()) > 0:
            self._reader.settimeout(min(left, _RESEND_S))
            try:
                repeated = self._next_signal()
            except TimeoutError:
                # An exception raised in a callback, such as a finaliser, is lost: send another.
                if not stopping.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                continue
            if not repeated:
                return
            if repeated == signal.SIGINT and time.monotonic() - received > _DUPLICATE_S:
                break
        self._exit_now()

    def _exit_now(self) -> None:
        """End the process from this thread, since the main thread does not."""
        self._finish()
        with suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):  # the temporary server
                with suppress(psutil.Error):
                    child.kill()
        os._exit(128 + self._number)

    def _finish(self) -> None:
        _attempt(_CANCEL_S, cancel_unfinished)
        if not self._message_shown:
            self._message_shown = True
            _attempt(_MESSAGE_S, self._show_message)


def _raise(number: int, frame: FrameType | None) -> None:
    if not stopping.is_set():
        raise KeyboardInterrupt


def _ignore_lost_stop(unraisable: sys.UnraisableHookArgs) -> None:
    """Print nothing about a stop that was lost in a callback: it is sent again."""
    if not is_stop(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _attempt(seconds: float, action: Callable[[], None]) -> None:
    """Run an action that may fail or hang, for a limited time."""

    def quietly() -> None:
        with suppress(Exception):
            action()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
