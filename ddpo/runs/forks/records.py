"""Which runs branch off which: a fork names its parent, and leaves a record beside it."""

from __future__ import annotations

from ddpo.runs.run import Run
from ddpo.store import runs


def record_fork(run: Run) -> None:
    """Leave a record of a fork beside the run that it branches off, once."""
    fork = run.config.fork
    if fork is None:
        return
    runs.record_fork(run.store, fork.run_id, run.run_id, fork.epoch)
