"""An epoch as the flow has it, from the tasks' own bodies, without Prefect around them."""

from __future__ import annotations

from ddpo.runs.run import Run
from ddpo.store.manifests import Ref
from ddpo_workflow.tasks import prompts, worker
from ddpo_workflow.tasks.advantages import advantages_of
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.pictures import draw_pictures, picture_set
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking import epochs as track
from ddpo_workflow.tasks.tracking.epochs import TrackingHandle, track_epoch, track_pictures
from ddpo_workflow.tasks.update import update_policy
from ddpo_workflow.tasks.worker import RunHandle


def as_in_a_new_process() -> None:
    """Forget all that a process keeps between tasks."""
    worker.opened.cache_clear()
    track.tracker.cache_clear()
    prompts._remembered.clear()
    worker._loaded = None


def run_epochs(run: Run, epochs: int) -> Ref:
    """Run a run's epochs up to ``epochs - 1``; returns the last checkpoint."""
    handle = RunHandle(root=run.store.root, s3=run.store.s3, run_id=run.run_id)
    checkpoint = start.fn(handle)
    for epoch in range(run.first_epoch, epochs):
        checkpoint = run_epoch(handle, run, checkpoint, epoch)
    return checkpoint


def run_epoch(
    handle: RunHandle,
    run: Run,
    checkpoint: Ref,
    epoch: int,
    tracking: TrackingHandle | None = None,
) -> Ref:
    """Run one epoch, shown in MLflow if `tracking` is given; returns the checkpoint after it."""
    if tracking:
        pictures = picture_set(run, run.config.tracking.pictures)
        drawn = draw_pictures.fn(handle, checkpoint, pictures, epoch)
        track_pictures.fn(handle, tracking, drawn, epoch)
    rollouts = [sample_shard.fn(handle, checkpoint, epoch, shard) for shard in range(run.shards)]
    scores = [score_shard.fn(handle, ref, epoch, shard) for shard, ref in enumerate(rollouts)]
    advantages = advantages_of.fn(handle, checkpoint, rollouts, scores, epoch)
    following = update_policy.fn(handle, checkpoint, rollouts, advantages, epoch)
    kept = run.config.storage
    commit_epoch.fn(handle, rollouts, scores, advantages, following, kept, epoch)
    if tracking:
        track_epoch.fn(handle, tracking, scores, advantages, following, {}, epoch)
    return following
