"""Record each fork beside its parent, so that retention spares what the fork inherits."""

from __future__ import annotations

from ddpo.runs.run import Run
from ddpo.store import runs


def record_fork(run: Run) -> None:
    """Record a fork beside its parent, once; does nothing for other runs.

    Raises:
        RunBeingDeleted: The parent's deletion has begun since the fork was planned.
    """
    fork = run.fork
    if fork is None:
        return
    runs.record_fork(run.store, fork.parent_id, run.run_id, fork.epoch)
    runs.check_not_being_deleted(run.store, fork.parent_id)
