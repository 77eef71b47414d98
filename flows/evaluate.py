"""Checkpoints against the first one on fixed prompts and seeds, at inference settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect import get_run_logger
from prefect.futures import PrefectFuture

from ddpo.analysis.evaluation.plan import evaluation_set, is_due, same_evaluation_set
from ddpo.config import EvaluationConfig
from ddpo.errors import ModelError
from ddpo.runs import Run
from ddpo.store.artefacts import EvaluationShard, GateDecision
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHAMPION, CHECKPOINT, EVALUATION_SHARD
from ddpo.store.manifests import Ref
from ddpo.store.upkeep.retention import is_retired
from ddpo_workflow.flows.flow import artifact_key, ddpo_flow
from ddpo_workflow.flows.forms import Text
from ddpo_workflow.flows.links import link_page
from ddpo_workflow.flows.run_requests import EvaluateRequest
from ddpo_workflow.tasks.champion import find_champion
from ddpo_workflow.tasks.engines import open_engine
from ddpo_workflow.tasks.evaluate import (
    sample_evaluation,
    score_evaluation,
    shards_of,
    summarize_evaluation,
)
from ddpo_workflow.tasks.evaluated import (
    baseline_of,
    completely_evaluated,
    is_evaluated,
    summary_id,
    weights_to_evaluate,
)
from ddpo_workflow.tasks.export_weights import export_weights
from ddpo_workflow.tasks.gate import pass_gate
from ddpo_workflow.tasks.tracking.catch_up import track_missing_evaluations
from ddpo_workflow.tasks.tracking.evaluation import track_evaluation
from ddpo_workflow.tasks.tracking.page import open_evaluation_page
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle


@ddpo_flow(name="ddpo-evaluate", run_name="{run_id} evaluated")
def evaluate(
    run_id: str,
    epochs: Text = None,
    rewards: Sequence[str] = (),
    overrides: Sequence[str] = (),
    storage: Text = None,
    trust: bool = False,
) -> list[dict[str, float]]:
    """Evaluate a run's checkpoints on fixed prompts and seeds, against its first one.

    Args:
        run_id: The run's name.
        epochs: One checkpoint, or a range `a:b` that excludes b; a or b may be omitted. Empty: all
            that are kept.
        rewards: Names of other rewards to score the images with.
        overrides: Settings of the evaluation, one per item, such as `evaluation.count=32`.
        storage: Folder or URL of the store. Empty: the worker's DDPO_ROOT, or the local store.
        trust: Allow the code, addresses and files that a run from another machine names.

    Returns:
        The summary of each checkpoint.
    """
    plan = EvaluateRequest(
        run_id=run_id,
        epochs=epochs,
        rewards=tuple(rewards),
        overrides=tuple(overrides),
        storage=storage,
        trust=trust,
    ).plan()
    images = evaluation_set(plan.run, plan.config)
    name = summary_id(plan.run, plan.config, images)
    with open_evaluation_page(plan.run, name, plan.config) as page, open_engine(plan.run):
        key = artifact_key(f"{plan.run.run_id}-{name}", plan.run.uid)
        link_page(page, key, f"{run_id} evaluated")
        summaries = [
            summary
            for epoch in plan.epochs
            for summary in evaluate_checkpoint(plan.run, page.handle, plan.config, epoch).results()
        ]
        crown(plan.run, page.handle, plan.config)
    return summaries


@dataclass(frozen=True)
class Pending:
    """An evaluation that runs beside other work."""

    images: tuple[PrefectFuture[Ref[EvaluationShard]], ...]
    """The images of all sets of weights, shard by shard."""
    summaries: tuple[PrefectFuture[dict[str, float]], ...]
    """One for each set of weights."""

    def wait_for_images(self) -> None:
        """Wait until all images are committed and the checkpoint is no longer needed."""
        for shard in self.images:
            shard.result()

    def results(self) -> list[dict[str, float]]:
        """Wait for the evaluation; return its summaries."""
        return [summary.result() for summary in self.summaries]


class Evaluations:
    """The evaluations during a run: each is scored while the next epoch runs.

    Args:
        run: The run; without a section `evaluation` in its config, nothing is evaluated.
        tracking: Its page in MLflow.
    """

    def __init__(self, run: Run, tracking: TrackingHandle) -> None:
        self._run, self._tracking = run, tracking
        self._pending: list[Pending] = []
        config = run.config.evaluation
        self._digest = evaluation_set(run, config).digest if config else ""

    def catch_up(self, epoch: int) -> None:
        """Complete the evaluations before an epoch that an earlier start left unfinished."""
        run, config = self._run, self._run.config.evaluation
        if config is None or epoch == run.first_epoch:
            return
        track_missing_evaluations(run.handle, self._tracking, config, epoch)
        done = completely_evaluated(run, config)
        for earlier in sorted({*range(run.first_epoch, epoch)} - done):
            self.begin(earlier)
            if earlier == run.first_epoch:
                self.finish()  # the others are compared with it
        self.finish()

    def begin(self, epoch: int, *, last: bool = False) -> None:
        """Start to evaluate the checkpoint before an epoch, if it is due.

        Args:
            epoch: The epoch.
            last: Whether training has ended with it, which makes it due.
        """
        run, config = self._run, self._run.config.evaluation
        if config and (last or is_due(config, epoch, run.first_epoch, run.config.epochs)):
            same_evaluation_set(run, config, "trained", self._digest)
            if not has_images(run, config, epoch) and is_retired(run.store, run.run_id, epoch):
                return  # the run was not evaluated yet when retention deleted it
            pending = evaluate_checkpoint(run, self._tracking, config, epoch)
            self._pending.append(pending)
            # The epoch needs the device as well, and retention deletes the checkpoint after it.
            pending.wait_for_images()

    def finish(self) -> None:
        """Wait for the evaluations that have begun."""
        pending, self._pending = self._pending, []
        for each in pending:
            each.results()

    def decision(self, epoch: int) -> Ref[GateDecision] | None:
        """Return the decision of the gate to end training; None if training goes on.

        Args:
            epoch: A checkpoint whose evaluation has finished, or that was not due.
        """
        run, config = self._run, self._run.config.evaluation
        if config is None or not is_evaluated(run, config, epoch):
            return None
        return pass_gate(run.handle, config, epoch)

    def champion(self) -> int | None:
        """Mark the best evaluated checkpoint; return its epoch, None if there is none."""
        if self._run.config.evaluation is None:
            return None
        return crown(self._run, self._tracking, self._run.config.evaluation)


def crown(run: Run, tracking: TrackingHandle, config: EvaluationConfig) -> int | None:
    """Find the best evaluated checkpoint and mark it in MLflow's registry.

    Weights that draw other images in a fresh process are no champion, and fail nothing: what was
    trained is kept.

    Args:
        run: The run.
        tracking: Its page in MLflow.
        config: The evaluation's settings.

    Returns:
        Its epoch; None if there is none.
    """
    try:
        champion = find_champion(run.handle, config)
    except ModelError as error:
        get_run_logger().warning("no champion is chosen: %s", error)
        return None
    if champion is None:
        return None
    epoch = CHAMPION.load(run.store, champion).epoch
    checkpoint = CHECKPOINT.find(run.store, Partition(run.run_id, epoch))
    assert checkpoint is not None
    export_weights(run.handle, tracking, checkpoint, None, epoch, champion=True)
    return epoch


def has_images(run: Run, config: EvaluationConfig, epoch: int) -> bool:
    """Return whether all images that a checkpoint is evaluated on are committed."""
    images = evaluation_set(run, config)
    wheres = (
        Partition(run.run_id, epoch, shard, images_id=images.set_id)
        for shard in range(len(shards_of(run, images)))
    )
    return all(EVALUATION_SHARD.exists(run.store, where) for where in wheres)


def evaluate_checkpoint(
    run: Run, tracking: TrackingHandle, config: EvaluationConfig, epoch: int
) -> Pending:
    """Start to evaluate a checkpoint, with its trained weights and their average if there is one.

    Images are sampled on the device before anything that is submitted to it later, and scored
    beside it. Whatever is already committed is reused.

    Args:
        run: The run.
        tracking: Its page in MLflow.
        config: The evaluation's settings.
        epoch: The checkpoint's epoch.
    """
    checkpoint = CHECKPOINT.find(run.store, Partition(run.run_id, epoch))
    assert checkpoint is not None
    handle = run.handle
    images: list[Any] = []
    summaries: list[Any] = []
    for weights in weights_to_evaluate(run, epoch):
        images_of = evaluation_set(run, config, weights)
        digest, shards = images_of.digest, range(len(shards_of(run, images_of)))
        # Futures: Prefect resolves them to their results before a task runs.
        samples: list[Any] = [
            sample_evaluation.submit(handle, checkpoint, config, weights, digest, epoch, shard)
            for shard in shards
        ]
        scores: list[Any] = [
            score_evaluation.submit(handle, samples[shard], epoch, shard, reward)
            for reward in (None, *config.rewards)
            for shard in shards
        ]
        baseline = baseline_of(run, config, weights, epoch)
        summary: Any = summarize_evaluation.submit(
            handle, config, weights, digest, samples, scores, baseline, epoch
        )
        images += samples
        summaries.append(track_evaluation.submit(handle, tracking, config, summary, weights, epoch))
    return Pending(tuple(images), tuple(summaries))
