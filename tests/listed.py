"""Many runs in a store, with nothing but what a list of them reads."""

from __future__ import annotations

from ddpo.runs import Run
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, EPOCH
from ddpo.store.runs import append_operation, create_or_check_run, load_run


def many_runs(like: Run, *, runs: int, epochs: int) -> list[str]:
    """Write runs like another one, each epoch with the advantages of that run's first.

    Args:
        like: The run.
        runs: Number of runs.
        epochs: Number of epochs of each.

    Returns:
        Their names.
    """
    store, record = like.store, load_run(like.store, like.run_id)
    first = ADVANTAGES.require(store, Partition(like.run_id, 0, reward_id=like.reward_id))
    names = [f"run-{number:03}" for number in range(runs)]
    for name in names:
        create_or_check_run(
            store, name, identity=record.identity, numerics=record.numerics, code=record.code
        )
        append_operation(store, name, {**like.config.operation(), "epochs": epochs})
        for epoch in range(epochs):
            where = Partition(name, epoch, reward_id=like.reward_id)
            advantages = ADVANTAGES.commit(store, where, {}, first.objects).ref
            EPOCH.commit(store, Partition(name, epoch), {"advantages": advantages}, {})
    return names
