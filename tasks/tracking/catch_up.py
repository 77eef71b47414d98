"""The task that logs what an earlier start of a run committed and could not log."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.config import EvaluationConfig
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH, IMAGES
from ddpo_workflow.tasks.evaluated import (
    completely_evaluated,
    evaluation_ref,
    weights_to_evaluate,
)
from ddpo_workflow.tasks.pictures import PictureSet
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.tracking.connection import waited_for
from ddpo_workflow.tasks.tracking.evaluation import ALARMS, PREFIXES, track_evaluation
from ddpo_workflow.tasks.tracking.metrics import track_epoch, track_pictures
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle, tracker
from ddpo_workflow.tasks.worker import RunHandle, opened

_ALWAYS_LOGGED = "scores/failed"


@task(
    name="track", task_run_name="track what is missing before {epoch}", cache_policy=NO_CACHE,
    **STORAGE,
)  # fmt: skip
def track_missing(
    handle: RunHandle, tracking: TrackingHandle, pictures: PictureSet, epoch: int
) -> None:
    """Log the metrics and images of the epochs before one that the page does not show.

    The process that committed them may have ended while MLflow was unavailable.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
        pictures: The fixed prompts and seeds.
        epoch: The first epoch that this start logs anyway.
    """
    run, page = opened(handle), tracker(tracking)
    if epoch == run.first_epoch:
        return
    shown = waited_for(tracking.uri, lambda: page.steps(_ALWAYS_LOGGED))
    for earlier in range(run.first_epoch, epoch):
        commit = EPOCH.require(run.store, Partition(run.run_id, earlier))
        if earlier not in shown:
            advantages, checkpoint = commit.advantages, commit.next_checkpoint
            track_epoch.fn(handle, tracking, advantages, checkpoint, {}, earlier)
        where = Partition(run.run_id, earlier, images_id=pictures.pictures_id)
        if images := IMAGES.find(run.store, where):
            listed = waited_for(tracking.uri, lambda step=earlier: page.images_at(step))
            if listed < len(pictures.pairs):
                track_pictures.fn(handle, tracking, images, earlier)


@task(
    name="track", task_run_name="track evaluations that are missing before {epoch}",
    cache_policy=NO_CACHE, **STORAGE,
)  # fmt: skip
def track_missing_evaluations(
    handle: RunHandle, tracking: TrackingHandle, config: EvaluationConfig, epoch: int
) -> None:
    """Log the evaluations of the checkpoints before one that the page does not show.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
        config: The evaluation's settings.
        epoch: The first checkpoint that this start evaluates anyway.
    """
    run, page = opened(handle), tracker(tracking)
    shown = {
        weights: waited_for(tracking.uri, lambda name=f"{prefix}/{ALARMS}": page.steps(name))
        for weights, prefix in PREFIXES.items()
    }
    for earlier in sorted(completely_evaluated(run, config)):
        for weights in weights_to_evaluate(run, earlier):
            if earlier < epoch and earlier not in shown[weights]:
                found = evaluation_ref(run, config, earlier, weights)
                track_evaluation.fn(handle, tracking, config, found, weights, earlier)
