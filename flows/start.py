"""How a run gets its first checkpoint: from the base model, or from the run it branches off."""

from __future__ import annotations

from ddpo.runs.forks.checks import epochs_before, rebuilds_statistics, saved_rollouts
from ddpo.runs.run import Run
from ddpo.store.artefacts import Scores
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Ref
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import check_fork, start


def first_checkpoint(run: Run) -> Ref[Checkpoint]:
    """Commit a run's first checkpoint, or find it.

    A fork's prompt statistics are on the scale of its own reward: the epochs before it are scored
    again, a task a shard, unless its config resets them. Scores of the same reward are found.

    Args:
        run: The run.

    Returns:
        The checkpoint's manifest.
    """
    if found := CHECKPOINT.find(run.store, Partition(run.run_id, run.first_epoch)):
        return found  # the epochs before it may be retired by now
    if not rebuilds_statistics(run.config):
        return start(run.handle)
    check_fork(run.handle)
    return start(run.handle, scores_before(run))


def scores_before(run: Run) -> list[Ref[Scores]]:
    """Score the epochs whose rewards a fork's prompt statistics are rebuilt from, a task a shard.

    Args:
        run: The fork, of whose reward the scores are.

    Returns:
        The scores' manifests, in order.

    Raises:
        RetiredObject: Retention deleted samples of one of them.
    """
    fork = run.config.fork
    assert fork is not None
    reward = run.config.reward.model_dump_json()
    return [
        score_shard(owner.handle.model_copy(update={"reward": reward}), ref, epoch, shard)
        for owner, epoch in epochs_before(run, fork)
        for shard, ref in enumerate(saved_rollouts(owner, epoch))
    ]
