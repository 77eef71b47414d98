"""How a run gets its first checkpoint: from the base model, or from the run it branches off."""

from __future__ import annotations

from ddpo.config import PerPromptAdvantages, Regression
from ddpo.run import Run
from ddpo.store.checkpoints import find_checkpoint
from ddpo.store.manifests import Ref
from tasks.adopt import epochs_before, saved_rollouts
from tasks.score import score_shard
from tasks.start import start
from tasks.worker import RunHandle


def first_checkpoint(run: Run, handle: RunHandle) -> Ref:
    """Commit a run's first checkpoint, or find it.

    A fork's prompt statistics are on the scale of its own reward: the epochs before it are scored
    again, a task a shard, unless its config resets them. Scores of the same reward are found.

    Args:
        run: The run.
        handle: The same, for tasks.

    Returns:
        The checkpoint's manifest.
    """
    if done := find_checkpoint(run.store, run.run_id, run.first_epoch):
        return done.ref  # the epochs before it may be retired by now
    fork = run.config.fork
    if not fork or fork.statistics == "reset":
        return start(handle)
    normalised = not isinstance(run.config.algorithm, Regression)
    if not (normalised and isinstance(run.config.advantages, PerPromptAdvantages)):
        return start(handle)  # nothing is remembered from epoch to epoch
    reward = run.config.reward.model_dump_json()
    history = [
        score_shard(
            handle.model_copy(update={"run_id": owner.run_id, "reward": reward}), ref, epoch, shard
        )
        for owner, epoch in epochs_before(run, fork)
        for shard, ref in enumerate(saved_rollouts(owner, epoch))
    ]
    return start(handle, history)
