"""How a run gets its first checkpoint: from the base model, or from a fork's parent."""

from __future__ import annotations

from ddpo.config import RewardConfig
from ddpo.runs import Fork, Run
from ddpo.runs.forks.checks import saved_rollouts
from ddpo.store.artefacts import Scores
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Ref
from ddpo_workflow.tasks.progress import begin_stage
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start


def first_checkpoint(run: Run) -> Ref[Checkpoint]:
    """Commit a run's first checkpoint, or find it.

    A fork's prompt statistics are on the scale of its own reward: the epochs before it are scored
    again, one task a shard, unless its config resets them. Scores of the same reward are reused.

    Args:
        run: The run.

    Returns:
        The checkpoint.
    """
    if checkpoint := CHECKPOINT.find(run.store, Partition(run.run_id, run.first_epoch)):
        return checkpoint  # without the epochs before it, which may be retired by now
    if run.fork is None or not run.fork.rebuilds_statistics:
        return start(run.handle)
    return start(run.handle, scores_before(run.fork, run.config.reward))


def scores_before(fork: Fork, reward: RewardConfig) -> list[Ref[Scores]]:
    """Score the epochs that a fork's prompt statistics are rebuilt from, one task a shard.

    Args:
        fork: The fork.
        reward: The reward.

    Returns:
        The scores, in order.

    Raises:
        RetiredObject: Retention deleted samples of one of the epochs.
    """
    begin_stage("statistics")
    return [
        score_shard(owner.handle, rollouts, epoch, shard, reward)
        for owner, epoch in fork.epochs_before()
        for shard, rollouts in enumerate(saved_rollouts(owner, epoch))
    ]
