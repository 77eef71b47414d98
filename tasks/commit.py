"""The task that closes an epoch: one commit that lists all of it, then retention."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.analysis.evaluation.champion import best_of
from ddpo.analysis.evaluation.plan import is_due
from ddpo.runs import Run
from ddpo.store.artefacts import AdvantageTable, EpochCommit, RolloutShard, Scores
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH, committed
from ddpo.store.manifests import Ref
from ddpo.store.upkeep.epoch_retention import retire_epochs
from ddpo.store.upkeep.retention import retire_checkpoints
from ddpo_workflow.tasks.evaluated import candidates
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened


@task(name="commit", task_run_name="commit epoch {epoch}", cache_policy=NO_CACHE, **STORAGE)
def commit_epoch(
    handle: RunHandle,
    rollouts: Sequence[Ref[RolloutShard]],
    scores: Sequence[Ref[Scores]],
    advantages: Ref[AdvantageTable],
    next_checkpoint: Ref[Checkpoint],
    epoch: int,
) -> Ref[EpochCommit]:
    """Commit the epoch, then retire the checkpoints and epochs that the config does not keep.

    Args:
        handle: The run.
        rollouts: The epoch's shards, in order.
        scores: Their scores, in order.
        advantages: The epoch's advantages.
        next_checkpoint: Checkpoint ``epoch + 1``.
        epoch: The epoch.
    """
    run = opened(handle)
    inputs = {
        "rollouts": list(rollouts),
        "rewards": list(scores),
        "advantages": advantages,
        "checkpoint": next_checkpoint,
    }
    ref = committed(run.store, EPOCH, Partition(run.run_id, epoch), inputs, dict)
    storage = run.config.storage
    if storage.keep_newest_checkpoints is not None:
        retire_checkpoints(
            run.store,
            run.run_id,
            keep_newest=storage.keep_newest_checkpoints,
            keep_every=storage.keep_every_checkpoint,
            needed_from=run.drawn_by(epoch + 1).epoch,
            also=_may_be_champion(run, epoch),
        )
    retention = storage.retention
    retire_epochs(run.store, run.run_id, keep=retention.keep, older_than=retention.older_than)
    return ref


def _may_be_champion(run: Run, epoch: int) -> list[int]:
    """Return the best checkpoint so far, and the one whose evaluation runs beside this epoch."""
    config = run.config.evaluation
    if config is None:
        return []
    due = [epoch] if is_due(config, epoch, run.first_epoch, run.config.epochs) else []
    # Without this epoch's own: whether it is evaluated by now depends on earlier starts.
    found = candidates(run, config, before=epoch)
    best = best_of(found) if found else None
    return due + ([best.epoch] if best else [])
