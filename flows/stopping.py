"""Stopping a run: Ctrl-C and SIGTERM are one clean end, within ten seconds.

A commit is whole or absent, so a task may be abandoned at any instant. The signal raises in the
main thread, as Python and Prefect have it; on the way out MLflow's run is ended as killed, and each
flow run, which Prefect takes for crashed, is marked as cancelled by a hook. None of that may take
long, and all of it may get stuck: `Stop` watches from a thread, and ends the process itself.
"""

from __future__ import annotations

import gc
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any
from uuid import UUID

import psutil
from prefect import Flow, State
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner

from ddpo.store.objects import Store

_RAISED = (KeyboardInterrupt, TerminationSignal)

_GRACE_S = 6.0
_AGAIN_S = 1.0
_CANCEL_S = 1.5
_TELL_S = 0.5
_ECHO_S = 1.0  # `timeout`, `make` and `uv run` pass on a Ctrl-C that the terminal has sent already

_noticed = threading.Event()
"""Whether a stop is known to be on its way out: from then on no signal raises any more."""

_begun: dict[str, UUID] = {}
"""The last flow run that this process began of each flow, by the flow's name."""


def resume_command(store: Store, run_id: str) -> str:
    """Return the command that goes on with a run, as a shell takes it.

    No AWS variable says how a bucket is addressed or that its certificate is not checked: a run
    that needs that is gone on with by its config.

    Args:
        store: Where the run is.
        run_id: The run's name.
    """
    if store.s3 and (store.s3.addressing_style != "auto" or not store.s3.verify_tls):
        return f"the same ddpo train command, with --run-id {shlex.quote(run_id)}"
    command = shlex.join(["ddpo", "resume", run_id, "--root", store.root.removeprefix("file://")])
    for name, value in (store.s3.environment() if store.s3 else {}).items():
        command = f"{name}={shlex.quote(value)} {command}"
    return command


def is_stop(error: BaseException | None) -> bool:
    """Return whether Ctrl-C or SIGTERM is what an error comes from.

    A signal may raise anywhere in Prefect, whose own clean-up may then fail with another error.
    """
    while error is not None and not isinstance(error, _RAISED):
        error = error.__context__
    return error is not None


def notice(error: BaseException | None) -> bool:
    """Return whether a stop is what an error comes from; let no further signal disturb its end."""
    if is_stop(error):
        _noticed.set()
    return is_stop(error)


class AbandoningThreads(ThreadPoolTaskRunner[Any]):
    """Threads for tasks, none of which is waited for once its flow is stopped.

    Prefect's own waits without bound, for a reward that takes minutes, say.
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
        super().__exit__(exc_type, exc_value, traceback)


def note_begun(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Remember a flow run that begins; a hook for ``on_running``."""
    _begun[flow.name] = flow_run.id


def mark_stopped(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Mark a flow run as cancelled if a stop ended it; for ``on_crashed`` and ``on_failure``."""
    if not notice(sys.exception()):  # which Prefect handles while it calls this
        return
    _cancel(flow_run.id)
    if flow_run.parent_task_run_id is None:
        # After a SIGTERM that nobody handles but Prefect, the process ends with its next step.
        for handler in logging.getLogger("prefect.flow_runs").handlers:
            handler.flush()


def _cancel(flow_run_id: UUID) -> None:
    message = (
        "Stopped by a signal; what is committed is kept, and `ddpo resume`, or the same `ddpo "
        "compare`, goes on from there"
    )
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelled(message=message), force=True)


def _cancel_begun() -> None:
    with get_client(sync_client=True) as client:
        states = {begun: client.read_flow_run(begun).state for begun in _begun.values()}
    for begun, state in states.items():
        if state is None or not (state.is_completed() or state.is_cancelled()):
            _cancel(begun)


class Stop:
    """A context in which the first Ctrl-C or SIGTERM ends the process, cleanly and soon.

    It leaves with 130 after Ctrl-C and 143 after SIGTERM, as a shell would report it. A second
    Ctrl-C does not wait for the rest.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        """Prepare.

        Args:
            tell: Says how to go on; called once, at the end of a stop, perhaps from a thread.
        """
        self._tell = tell
        self._told = False
        self._number = int(signal.SIGINT)
        self._heard = threading.Event()
        self._ear, self._mouth = socket.socketpair()

    def __enter__(self) -> None:
        # Python writes each signal's number here, whoever has set the handler by then and whatever
        # the main thread is in.
        self._mouth.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        _noticed.clear()
        sys.unraisablehook = _pass_over
        # Also where a shell had SIGINT ignored, as it does for jobs in the background.
        self._before = {
            sign: signal.signal(sign, _raise) for sign in (signal.SIGINT, signal.SIGTERM)
        }
        threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What comes out may be another error: that of a server which the signal has ended, too.
        if notice(error) or (error is not None and self._heard.is_set()):
            self._heard.wait(1.0)
            self._finish()
            # Collecting what the process leaves takes seconds, in which nothing watches any more.
            gc.disable()
            gc.freeze()
            sys.exit(128 + self._number)
        sys.unraisablehook = sys.__unraisablehook__
        signal.set_wakeup_fd(self._wakeup_before)
        for sign, handler in self._before.items():
            signal.signal(sign, handler)
        self._mouth.close()

    def _next(self) -> int:
        """Return the number of the next signal that is to stop; 0 once the context is left."""
        while number := self._ear.recv(1):  # other libraries handle other signals
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                return number[0]
        return 0

    def _watch(self) -> None:
        number = self._next()
        if not number:
            return
        self._number = number
        self._heard.set()
        heard = time.monotonic()
        while (left := heard + _GRACE_S - time.monotonic()) > 0:
            self._ear.settimeout(min(left, _AGAIN_S))
            try:
                again = self._next()
            except TimeoutError:
                # What a signal raises gets lost in callbacks, as when Python frees an object.
                if not _noticed.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                continue
            if not again:
                return
            if again == signal.SIGINT and time.monotonic() - heard > _ECHO_S:
                break
        self._leave()

    def _leave(self) -> None:
        """End the process from outside the main thread, which does not come."""
        self._finish()
        with suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):  # the temporary server
                with suppress(psutil.Error):
                    child.kill()
        os._exit(128 + self._number)

    def _finish(self) -> None:
        _within(_CANCEL_S, _cancel_begun)
        if not self._told:
            self._told = True
            _within(_TELL_S, self._tell)


def _raise(number: int, frame: FrameType | None) -> None:
    if not _noticed.is_set():
        raise KeyboardInterrupt


def _pass_over(unraisable: sys.UnraisableHookArgs) -> None:
    """Say nothing of a stop that was lost: it is raised again."""
    if not is_stop(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def start_server() -> None:
    """Start Prefect's temporary server, where one is needed, deaf to Ctrl-C.

    A terminal sends Ctrl-C to the server as well, which is to take the run's last states first.
    What is blocked here is blocked there, and ending a run ends it by SIGTERM.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _within(seconds: float, do: Callable[[], None]) -> None:
    """Try something that may fail or never end."""

    def quietly() -> None:
        with suppress(Exception):
            do()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
