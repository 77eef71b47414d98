"""What a run is doing, as far as its store says."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from ddpo.errors import StoreError
from ddpo.runs.run import Run
from ddpo.store import keys
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH
from ddpo.store.runs import StartRecord, Starts

Word = Literal["finished", "running", "stopped", "failed"]


@dataclass(frozen=True)
class RunState:
    """What a run is doing."""

    word: Word
    """In a word."""
    epoch: int
    """Number of epochs behind its last checkpoint."""
    epochs: int
    """Number of epochs that it has when it is finished."""
    reason: str = ""
    """Why it stopped or failed."""
    seen: datetime | None = None
    """When its process was last known to be alive (UTC), if it is running."""

    def __str__(self) -> str:
        where = {"running": ", ", "stopped": " at ", "failed": " at "}.get(self.word)
        text = self.word if where is None else f"{self.word}{where}epoch {self.epoch} of "
        text += "" if where is None else str(self.epochs)
        if self.seen:
            text += f", last sign of life {self.seen:%Y-%m-%d %H:%M:%S} UTC"
        return f"{text}: {self.reason}" if self.reason else text


def run_state(run: Run, starts: Starts, epoch: int) -> RunState:
    """Return what a run is doing.

    A process that was killed records no end: on this machine it is looked for; of another machine
    only the last sign of life is known.

    Args:
        run: The run.
        starts: Its starts.
        epoch: Number of epochs behind its last checkpoint.
    """
    epochs = run.config.epochs
    end = starts.end
    if epoch >= epochs and (end is None or end.outcome == "finished"):
        # An end that is missing may be about to come: what is left are exports.
        return RunState("finished", epoch, epochs)
    if end is not None and end.outcome != "finished":
        return RunState(end.outcome, epoch, epochs, end.reason)
    if starts.last is None or end is not None:
        return RunState("stopped", epoch, epochs)
    if _has_ended(starts.last):
        return RunState("stopped", epoch, epochs, "its process has ended")
    return RunState("running", epoch, epochs, seen=_last_sign(run, starts.last, epoch))


def _has_ended(start: StartRecord) -> bool:
    """Return whether the process of a start on this machine has ended; unknown counts as no."""
    if start.at is None or start.host != socket.gethostname():
        return False
    if start.process == os.getpid():
        return False
    import psutil

    try:
        return psutil.Process(start.process).create_time() > start.at.timestamp()
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _last_sign(run: Run, start: StartRecord, epoch: int) -> datetime | None:
    """Return when a run last renewed its lease, committed an epoch, or else started."""
    renewed = committed = None
    with suppress(StoreError):
        renewed = run.store.modified(keys.lease_key(run.run_id))
    if epoch > run.first_epoch:
        with suppress(StoreError):  # not every filesystem knows
            committed = run.store.modified(EPOCH.key(Partition(run.run_id, epoch - 1)))
    return max((time for time in (renewed, committed, start.at) if time), default=None)
