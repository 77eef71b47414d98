"""One epoch of DDPO (arXiv 2305.13301, algorithm 1) as a Prefect flow."""

from __future__ import annotations

import time

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import BaseModel, ConfigDict

from ddpo.config import StorageConfig
from ddpo.store import keys
from ddpo.store.manifests import Ref
from ddpo_workflow.flows.stopping import AbandoningThreads, mark_stopped, note_begun
from ddpo_workflow.tasks.advantages import advantages_of
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.pictures import PictureSet, draw_pictures
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.tracking.epochs import TrackingHandle, track_epoch, track_pictures
from ddpo_workflow.tasks.update import update_policy
from ddpo_workflow.tasks.worker import RunHandle, opened


class EpochPlan(BaseModel):
    """What every epoch of a run is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunHandle
    """The run."""
    tracking: TrackingHandle
    """Its MLflow run."""
    pictures: PictureSet
    """What is drawn with each checkpoint."""
    storage: StorageConfig
    """What is kept."""


class EpochOutcome(BaseModel):
    """What an epoch leaves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Ref
    """The checkpoint after the epoch."""
    metrics: dict[str, float]
    """What MLflow shows at the epoch's step."""


@flow(  # pyright: ignore[reportCallIssue]  # task runners are typed by what tasks return
    name="ddpo-epoch",
    flow_run_name="{plan.run.run_id} epoch {epoch}",
    task_runner=AbandoningThreads(max_workers=4),  # pyright: ignore[reportArgumentType]
    on_running=[note_begun],
    on_crashed=[mark_stopped],
    on_failure=[mark_stopped],
)
def run_epoch(plan: EpochPlan, checkpoint: Ref, epoch: int) -> EpochOutcome:
    """Sample, score, compute advantages, update; show it in MLflow.

    A shard is scored beside the sampling of the next one.

    Args:
        plan: The run, and where it is shown.
        checkpoint: The checkpoint before the epoch.
        epoch: The epoch, from 0.

    Returns:
        The checkpoint after the epoch, and what was measured.
    """
    run = opened(plan.run)
    # A resume shows its last committed epoch once more; how fast it is found says nothing.
    found = run.store.exists(keys.epoch_manifest_key(run.run_id, epoch))
    started = time.monotonic()
    pictures = draw_pictures(plan.run, checkpoint, plan.pictures, epoch)
    shown = track_pictures.submit(plan.run, plan.tracking, pictures, epoch)

    began = time.monotonic()
    rollouts, scoring = [], []
    for shard in range(run.shards):
        rollouts.append(sample_shard(plan.run, checkpoint, epoch, shard))
        scoring.append(score_shard.submit(plan.run, rollouts[-1], epoch, shard))
    sampled = time.monotonic()
    scores = [scored.result() for scored in scoring]
    advantages = advantages_of(plan.run, checkpoint, rollouts, scores, epoch)
    scored = time.monotonic()
    following = update_policy(plan.run, checkpoint, rollouts, advantages, epoch)
    updated = time.monotonic()
    commit_epoch(plan.run, rollouts, scores, advantages, following, plan.storage, epoch)

    timings = {
        "sample_s": sampled - began,
        "score_wait_s": scored - sampled,
        "update_s": updated - scored,
        "epoch_s": time.monotonic() - started,
        "images_per_s": run.config.rollouts.samples_per_epoch / (updated - began),
    }
    measured = {} if found else timings
    metrics = track_epoch(plan.run, plan.tracking, scores, advantages, following, measured, epoch)
    shown.result()
    create_table_artifact(
        key=f"{artifact_key(plan.run.run_id)}-epoch",
        table=[{"metric": name, "value": f"{value:.6g}"} for name, value in metrics.items()],
        description=f"Epoch {epoch} of {plan.run.run_id}",
    )
    return EpochOutcome(checkpoint=following, metrics=metrics)


def artifact_key(run_id: str) -> str:
    """Return a run's name as Prefect's artifact keys allow it: lower case, digits, dashes."""
    return "".join(c if c.isalnum() else "-" for c in run_id.lower()).strip("-")
