"""Which runs branch off which: a fork names its parent, and leaves a record beside it."""

from __future__ import annotations

from ddpo.runs.run import Run
from ddpo.store import keys, runs
from ddpo.store.documents import seal
from ddpo.store.objects import Store
from ddpo.store.upkeep import forks


def record_fork(run: Run) -> None:
    """Leave a record of a fork beside the run that it branches off, once."""
    fork = run.config.fork
    if fork is None:
        return
    document = {"schema_version": runs.SCHEMA_VERSION, "fork": run.run_id, "epoch": fork.epoch}
    run.store.put_if_absent(keys.fork_key(fork.run_id, run.run_id), seal(document))


def forks_of(store: Store, run_id: str) -> list[str]:
    """List the runs that branch off a run, sorted."""
    return forks.names(store, run_id)
