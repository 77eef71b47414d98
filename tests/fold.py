"""An epoch as the flow has it, from the tasks' own bodies, without Prefect around them."""

from __future__ import annotations

from ddpo.runs import Run
from ddpo.store.manifests import Ref
from ddpo_workflow.tasks import worker
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.pictures import draw_pictures, picture_set
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.backlog import backlog
from ddpo_workflow.tasks.tracking.metrics import track_epoch, track_pictures
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle, tracker
from ddpo_workflow.tasks.update import update_policy


def as_in_a_new_process() -> None:
    """Forget all that a process keeps between tasks."""
    worker.forget()
    tracker.cache_clear()
    backlog.cache_clear()


def run_epochs(run: Run, epochs: int) -> Ref:
    """Run a run's epochs up to ``epochs - 1``; returns the last checkpoint."""
    checkpoint = start.fn(run.handle)
    for epoch in range(run.first_epoch, epochs):
        checkpoint = run_epoch(run, checkpoint, epoch)
    return checkpoint


def run_epoch(run: Run, checkpoint: Ref, epoch: int, tracking: TrackingHandle | None = None) -> Ref:
    """Run one epoch, shown in MLflow if `tracking` is given; returns the checkpoint after it."""
    handle = run.handle
    if tracking:
        pictures = picture_set(run, run.config.tracking.pictures)
        drawn = draw_pictures.fn(handle, checkpoint, pictures, epoch)
        track_pictures.fn(handle, tracking, drawn, epoch)
    rollouts = [
        sample_shard.fn(handle, checkpoint, epoch, shard) for shard in range(run.shards_per_epoch)
    ]
    scores = [score_shard.fn(handle, ref, epoch, shard) for shard, ref in enumerate(rollouts)]
    advantages = credit_of.fn(handle, checkpoint, rollouts, scores, epoch)
    next_checkpoint = update_policy.fn(handle, checkpoint, rollouts, advantages, epoch)
    commit_epoch.fn(handle, rollouts, scores, advantages, next_checkpoint, epoch)
    if tracking:
        track_epoch.fn(handle, tracking, advantages, next_checkpoint, {}, epoch)
    return next_checkpoint
