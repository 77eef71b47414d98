"""What runs in a worker's process: a function, whose log and progress go back to the flow."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any

from ddpo.basics.trust import trust_in_process
from ddpo.errors import DdpoError
from ddpo_workflow.tasks import logs, progress

Event = logging.LogRecord | tuple[str, float, float]
"""A log record, or the progress of a stage: its name, units done, and units in all."""
Send = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    value: Any = None
    """What the function returned."""
    error: Exception | None = None
    """What it raised."""

    def result(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value


def run_here(call: Callable[[], Any]) -> Outcome:
    """Run a call; whatever it raises can be sent back."""
    try:
        return Outcome(call())
    except Exception as error:
        return Outcome(error=_sendable(error))


def begin(send: Send, trusted: Iterable[str]) -> None:
    """Prepare this process to work for a flow: its log and progress go there from now on.

    Args:
        send: Sends one event.
        trusted: Digests of the settings that the flow trusts.
    """
    for digest in trusted:
        trust_in_process(digest)
    logs.listen(_Sender(send))
    progress.show_by(_Reporter(send))


def receive(event: Event) -> None:
    """Log a record, or report progress, as if it had happened in this thread.

    Args:
        event: What a worker has sent.
    """
    if isinstance(event, logging.LogRecord):
        logging.getLogger(event.name).handle(event)
    else:
        progress.report(*event)


class _Sender(QueueHandler):
    """Sends records once their arguments are text, which can be pickled."""

    def __init__(self, send: Send) -> None:
        super().__init__(SimpleQueue())  # unused
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record."""
        self._send(record)


class _Reporter:
    def __init__(self, send: Send) -> None:
        self._send = send

    def stage(self, name: str, done: float, total: float) -> None:
        """Send the progress of a stage."""
        self._send((name, done, total))

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Send nothing: epochs end in the flow's process."""


def _sendable(error: Exception) -> Exception:
    """Return an error that can be sent to the flow, with its traceback as a note."""
    note = f"In a worker:\n{''.join(traceback.format_exception(error))}"
    if not isinstance(error, DdpoError) and not _is_plain(error):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _is_plain(error: Exception) -> bool:
    """Return whether an error is made again from its arguments, which are plain values."""
    if vars(error) or not all(isinstance(each, str | int | float) for each in error.args):
        return False
    try:
        type(error)(*error.args)
    except Exception:
        return False
    return True
