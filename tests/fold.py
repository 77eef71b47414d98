"""An epoch as the flow has it, from the tasks' own bodies, without Prefect around them."""

from __future__ import annotations

from ddpo.config import StorageConfig
from ddpo.run import Run
from ddpo.store.manifests import Ref
from tasks.advantages import advantages_of
from tasks.commit import commit_epoch
from tasks.sample import sample_shard
from tasks.score import score_shard
from tasks.start import start
from tasks.update import update_policy
from tasks.worker import RunHandle


def run_epochs(run: Run, epochs: int) -> Ref:
    """Run epochs 0 to ``epochs - 1``; returns the last checkpoint."""
    handle = RunHandle(root=run.store.root, run_id=run.run_id)
    checkpoint = start.fn(handle)
    for epoch in range(epochs):
        checkpoint = run_epoch(handle, run, checkpoint, epoch)
    return checkpoint


def run_epoch(handle: RunHandle, run: Run, checkpoint: Ref, epoch: int) -> Ref:
    """Run one epoch; returns the checkpoint after it."""
    rollouts = [sample_shard.fn(handle, checkpoint, epoch, shard) for shard in range(run.shards)]
    scores = [score_shard.fn(handle, ref, epoch, shard) for shard, ref in enumerate(rollouts)]
    advantages = advantages_of.fn(handle, checkpoint, rollouts, scores, epoch)
    following = update_policy.fn(handle, checkpoint, rollouts, advantages, epoch)
    commit_epoch.fn(handle, rollouts, scores, advantages, following, StorageConfig(), epoch)
    return following
