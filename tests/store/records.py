"""Records of runs, without the runs."""

from __future__ import annotations

from ddpo.store import keys, runs
from ddpo.store.objects import Store


def record_fork(store: Store, run_id: str, fork: str, epoch: int, **settings: object) -> None:
    """Leave the records of a fork that is to adopt a run's epochs from one on."""
    branch = {"run_id": run_id, "epoch": epoch, "off_policy": True, **settings}
    runs.create_or_check_run(store, fork, identity={"fork": branch}, numerics={}, code={})
    store.put_if_absent(keys.fork_key(run_id, fork), b"a record")
