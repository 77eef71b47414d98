"""Find one of a run's checkpoints by the number of epochs trained."""

from __future__ import annotations

from ddpo.errors import ConfigError
from ddpo.runs import Run
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT


def saved_checkpoint(run: Run, epoch: int | None) -> tuple[int, Checkpoint]:
    """Return a committed checkpoint and the number of epochs trained before it.

    Args:
        run: The run.
        epoch: Number of epochs trained; None for the latest checkpoint.

    Raises:
        ConfigError: There is no such checkpoint.
    """
    committed = [where.epoch for where in CHECKPOINT.partitions_of(run.store, run.run_id)]
    if not committed:
        raise ConfigError(f"run {run.run_id!r} has no checkpoint yet; start it with `ddpo resume`")
    requested = committed[-1] if epoch is None else epoch
    checkpoint = CHECKPOINT.get(run.store, Partition(run.run_id, requested))
    if checkpoint is None:
        known = f"{committed[0]} to {committed[-1]}"
        raise ConfigError(f"run {run.run_id!r} has no checkpoint {epoch}; it has {known}")
    return requested, checkpoint
