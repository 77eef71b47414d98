"""One epoch of DDPO (arXiv 2305.13301, algorithm 1) as a Prefect flow."""

from __future__ import annotations

from prefect.artifacts import create_table_artifact
from prefect.futures import PrefectFuture
from pydantic import BaseModel, ConfigDict

from ddpo.store.artefacts import RolloutShard, Scores
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH
from ddpo.store.manifests import Ref
from ddpo_workflow.flows.flow import artifact_key, ddpo_flow
from ddpo_workflow.flows.laps import Laps
from ddpo_workflow.flows.prefect_server import show
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.pictures import PictureSet, draw_pictures
from ddpo_workflow.tasks.progress import begin_stage
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.tracking.metrics import track_epoch, track_pictures
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle
from ddpo_workflow.tasks.update import update_policy
from ddpo_workflow.tasks.worker import RunHandle, opened


class EpochPlan(BaseModel):
    """What all epochs of a run have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunHandle
    """The run."""
    tracking: TrackingHandle
    """Its page in MLflow."""
    pictures: PictureSet
    """The fixed prompts and seeds that are sampled with each checkpoint."""


class EpochOutcome(BaseModel):
    """The result of an epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Ref[Checkpoint]
    """The checkpoint after the epoch."""
    metrics: dict[str, float]
    """The metrics that MLflow shows at the epoch's step."""


@ddpo_flow(name="ddpo-epoch", run_name="{plan.run.run_id} epoch {epoch}")
def run_epoch(plan: EpochPlan, checkpoint: Ref[Checkpoint], epoch: int) -> EpochOutcome:
    """Sample, score, compute advantages, update the policy; log the epoch to MLflow.

    Args:
        plan: The run, and where it is shown.
        checkpoint: The checkpoint before the epoch.
        epoch: The epoch, from 0.

    Returns:
        The checkpoint after the epoch, and its metrics.
    """
    run = opened(plan.run)
    drawn_by = run.drawn_by(epoch)
    own = drawn_by == Partition(run.run_id, epoch)
    ahead = run.config.rollouts.sample_ahead and epoch + 1 < run.config.epochs
    # A resumed run logs its last committed epoch again; how fast that is found means nothing.
    resumed = EPOCH.exists(run.store, Partition(run.run_id, epoch))
    laps = Laps()
    with laps("epoch"):
        pictures = draw_pictures(plan.run, checkpoint, plan.pictures, epoch)
        shown = track_pictures.submit(plan.run, plan.tracking, pictures, epoch)
        drew = checkpoint if own else CHECKPOINT.require_ref(run.store, drawn_by)
        sampling, scoring = submit_shards(plan.run, drew, epoch)
        next_sampling, next_scoring = (
            submit_shards(plan.run, checkpoint, epoch + 1) if ahead else ([], [])
        )
        with laps("sample"):
            rollouts = [shard.result() for shard in sampling]
            for shard in next_sampling:  # before the update, which takes all devices
                shard.result()
        with laps("score_wait"):
            if not resumed:
                begin_stage("score")
            scores = [shard.result() for shard in scoring]
            advantages = credit_of(plan.run, checkpoint, rollouts, scores, epoch)
        with laps("update"):
            next_checkpoint = update_policy(plan.run, checkpoint, rollouts, advantages, epoch)
        commit_epoch(plan.run, rollouts, scores, advantages, next_checkpoint, epoch)
        with laps("score_wait"):
            for shard in next_scoring:
                shard.result()
    metrics = track_epoch(
        plan.run,
        plan.tracking,
        advantages=advantages,
        next_checkpoint=next_checkpoint,
        timings={} if resumed else laps.timings(run.config.rollouts.samples_per_epoch),
        epoch=epoch,
    )
    shown.result()
    table = [{"metric": name, "value": f"{value:.6g}"} for name, value in metrics.items()]
    key, description = artifact_key(run.run_id, run.uid), f"Epoch {epoch} of {run.run_id}"
    show(lambda: create_table_artifact(table, key=f"{key}-epoch", description=description))
    return EpochOutcome(checkpoint=next_checkpoint, metrics=metrics)


def submit_shards(
    run: RunHandle, checkpoint: Ref[Checkpoint], epoch: int
) -> tuple[list[PrefectFuture[Ref[RolloutShard]]], list[PrefectFuture[Ref[Scores]]]]:
    """Start sampling an epoch; each shard is scored while the next one is sampled.

    Args:
        run: The run.
        checkpoint: The checkpoint to sample with.
        epoch: The epoch.

    Returns:
        The rollouts and the scores to come, one future a shard.
    """
    shards = range(opened(run).shards_per_epoch)
    sampling = [sample_shard.submit(run, checkpoint, epoch, shard) for shard in shards]
    scoring = [
        # Prefect resolves a future to its result before the task runs.
        score_shard.submit(run, rollouts, epoch, shard)  # pyright: ignore[reportArgumentType]
        for shard, rollouts in enumerate(sampling)
    ]
    return sampling, scoring
