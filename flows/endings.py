"""How a start of a run ended, recorded in the store for whoever looks at the run from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ddpo.basics.redaction import hide_credentials
from ddpo.errors import DdpoError
from ddpo.runs import Run
from ddpo.store.runs import record_end
from ddpo_workflow.tasks.stops import recognise_stop

_LONGEST = 500  # characters

_logger = logging.getLogger(__name__)


@dataclass
class Ending:
    """What a start says of its own end."""

    early: str = ""
    """Why it ended before all epochs were done, though nobody stopped it."""


@contextmanager
def recording_end(run: Run) -> Iterator[Ending]:
    """Record in the store how what happens within this context ends.

    Args:
        run: The run, as this start operates it.
    """
    ending = Ending()
    try:
        yield ending
    except Exception as error:
        if recognise_stop(error):
            _record(run, "stopped")
        else:
            _record(run, "failed", f"{type(error).__name__}: {error}")
        raise
    except BaseException:
        _record(run, "stopped")
        raise
    _record(run, "stopped" if ending.early else "finished", ending.early)


def _record(run: Run, outcome: Literal["finished", "stopped", "failed"], reason: str = "") -> None:
    """Record an outcome if the store can be reached: it is not waited for at the end of a run."""
    if run.start is None:
        return
    text = " ".join(hide_credentials(reason).split())[:_LONGEST]
    try:
        record_end(run.store.patient(0.0), run.run_id, run.start, outcome, text)
    except DdpoError as error:
        _logger.warning("how run %s ended is not recorded: %s", run.run_id, error)
