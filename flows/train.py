"""A whole run, epoch by epoch: start it or resume it, then export the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC
from functools import partial
from pathlib import Path
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run

from ddpo.analysis.evaluation.champion import gate_reason
from ddpo.analysis.report import write_report
from ddpo.errors import ConfigError, StoreError
from ddpo.runs import Run, RunPlan
from ddpo.runs.forks.records import record_fork
from ddpo.runs.lease import held_lease
from ddpo.runs.outputs import own_outputs_folder
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH, GATE_DECISION
from ddpo_workflow.flows.endings import recording_end
from ddpo_workflow.flows.epoch import EpochPlan, run_epoch
from ddpo_workflow.flows.evaluate import Evaluations
from ddpo_workflow.flows.flow import artifact_key, ddpo_flow, without_heartbeats
from ddpo_workflow.flows.forms import Number, Text, Whole
from ddpo_workflow.flows.links import link_page
from ddpo_workflow.flows.messages import resume_command
from ddpo_workflow.flows.prefect_server import show, watched_server
from ddpo_workflow.flows.report import write_run_page
from ddpo_workflow.flows.run_requests import ResumeRequest, TrainRequest, run_name_stem
from ddpo_workflow.flows.start import first_checkpoint
from ddpo_workflow.tasks.engines import held_gpus, open_engine
from ddpo_workflow.tasks.export_weights import export_weights
from ddpo_workflow.tasks.pictures import draw_pictures, picture_set
from ddpo_workflow.tasks.progress import begin_stage, finished_epoch, logged, note
from ddpo_workflow.tasks.stops import recognise_stop
from ddpo_workflow.tasks.tracking.catch_up import track_missing
from ddpo_workflow.tasks.tracking.metrics import track_pictures
from ddpo_workflow.tasks.tracking.page import open_page
from ddpo_workflow.tasks.tracking.tracker import RunTracker

_SHOWN = ("reward/mean", "reward/std", "update/approx_kl", "update/clip_fraction", "time/epoch_s")


def _run_name() -> str:
    """Name a flow run after its run; without a name, so that Prefect's retry resumes the run."""
    parameters = flow_run.get_parameters()
    stem = run_name_stem(parameters["config_file"])
    return parameters.get("run_id") or f"{stem}-{(flow_run.get_id() or '')[:8]}"


@ddpo_flow(name="ddpo-train", run_name=_run_name)
def train(
    config_file: str = "configs/starter.yaml",
    run_id: Text = None,
    epochs: Whole = None,
    seed: Whole = None,
    learning_rate: Number = None,
    storage: Text = None,
    tracking: Text = None,
    overrides: Sequence[str] = (),
    seed_of_date: bool = False,
) -> str:
    """Fine-tune a diffusion model on a reward.

    Args:
        config_file: A YAML file; `configs/` has examples.
        run_id: The run's name. An existing run is resumed. Empty: a new name.
        epochs: Number of rounds of sampling and training. Empty: the config's.
        seed: The seed of everything random. Empty: the config's.
        learning_rate: Learning rate of AdamW. Empty: the config's.
        storage: Folder or URL of the store, such as `s3://bucket/prefix`. Empty: the config's.
        tracking: MLflow's tracking URI, such as `http://host:5000`. Empty: the config's.
        overrides: Any other setting, one per item, such as `sampler.steps=20`.
        seed_of_date: Take the date (UTC) that the flow run was scheduled for as the seed, such as
            20261224, so that every night's run is another one. The schedule `nightly` ticks this.

    Returns:
        The run's name.
    """
    if seed_of_date:
        seed = fresh_seed(run_id, seed)
    request = TrainRequest(
        config_file=config_file,
        run_id=run_id or _run_name(),
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
        storage=storage,
        tracking=tracking,
        overrides=tuple(overrides),
    )
    return start_and_train(request.plan())


@ddpo_flow(name="ddpo-resume", run_name="{run_id}")
def resume(run_id: str, storage: Text = None, epochs: Whole = None, trust: bool = False) -> str:
    """Resume a run with the settings of its last start.

    Args:
        run_id: The run's name.
        storage: Folder or URL of the store. Empty: the worker's DDPO_ROOT, or the local store.
        epochs: Total number of epochs. Empty: as at the last start.
        trust: Allow the code, addresses and files that a run from another machine names.

    Returns:
        The run's name.
    """
    request = ResumeRequest(run_id=run_id, storage=storage, epochs=epochs, trust=trust)
    return start_and_train(request.plan())


def start_and_train(plan: RunPlan) -> str:
    """Start or resume a run that no other process trains, and train it.

    Args:
        plan: The run.

    Returns:
        The run's name.

    Raises:
        RunBeingTrained: Another process trains it; this start is not recorded.
        GpuInUse: Another run trains on its GPU; this start is not recorded.
    """
    gpus = held_gpus(plan.config.engine, plan.numerics.device, plan.run_id)
    with held_lease(plan.store, plan.run_id), gpus:
        run = plan.start()
        note_batch_sizes(plan, run)
        return train_run(run)


def note_batch_sizes(plan: RunPlan, run: Run) -> None:
    """Log the batch sizes that were found for a start, and what was measured, if they were.

    Args:
        plan: The start.
        run: What it started, with other sizes if another start of the run came first.
    """
    if plan.batch_sizes is not None and run.numerics == plan.numerics:
        note(plan.batch_sizes.message)


def fresh_seed(run_id: str | None, seed: int | None) -> int:
    """Return the seed of a new run that is scheduled; the same when Prefect retries the flow run.

    Args:
        run_id: The name that the run was given.
        seed: The seed that it was given.

    Raises:
        ConfigError: It was given one of them.
    """
    if run_id or seed is not None:
        given = "run_id" if run_id else "seed"
        raise ConfigError(
            f"seed_of_date makes a new run with a seed of its own, but {given} "
            "is set too: leave one of the two empty"
        )
    return int(f"{flow_run.get_scheduled_start_time().astimezone(UTC):%Y%m%d}")


def train_run(run: Run) -> str:
    """Train a run from its last committed epoch on, and export the result.

    Args:
        run: The run, as this start operates it.

    Returns:
        The run's name.
    """
    record_fork(run)  # also on a resume, in case an earlier start was killed before it
    epochs = run.config.epochs
    command = resume_command(run.store, run.run_id)
    pictures = picture_set(run, run.config.tracking.pictures)
    key = artifact_key(run.run_id, run.uid)
    description = f"{run.run_id}: {epochs} epochs"
    progress = show(
        lambda: create_progress_artifact(0.0, key=f"{key}-progress", description=description)
    )
    with (
        recording_end(run) as ending,
        watched_server(),
        open_page(run, command) as page,
        _saying_how_to_resume(command),
        logged(),
        open_engine(run),
    ):
        link_page(page, key, run.run_id)
        plan = EpochPlan(run=run.handle, tracking=page.handle, pictures=pictures)
        evaluations = Evaluations(run, page.handle)
        rows: list[dict[str, str]] = []
        first = first_unfinished_epoch(run)
        resumed = first > run.first_epoch
        track_missing(run.handle, page.handle, pictures, first)
        checkpoint = (
            CHECKPOINT.require_ref(run.store, Partition(run.run_id, first))
            if resumed
            else first_checkpoint(run)
        )
        evaluations.catch_up(first)
        last, ended = first, None
        for epoch in range(first, epochs):
            evaluations.begin(epoch)
            with without_heartbeats():  # this flow has its own
                outcome = run_epoch(plan, checkpoint, epoch)
            evaluations.finish()
            ended = evaluations.decision(epoch)
            checkpoint, last = outcome.checkpoint, epoch + 1
            finished_epoch(last, epochs, outcome.metrics)
            rows.append({"epoch": str(epoch), **_row(outcome.metrics)})
            if isinstance(progress, UUID):
                percent = 100.0 * last / epochs
                show(partial(update_progress_artifact, progress, progress=percent))
            if ended is not None or last == epochs:
                break
            if last % run.config.tracking.adapter_every == 0:
                export_weights(run.handle, page.handle, checkpoint, None, last)
        evaluations.begin(last, last=True)
        drawn = draw_pictures(run.handle, checkpoint, pictures, last)
        track_pictures(run.handle, page.handle, drawn, last)
        evaluations.finish()
        ended = ended or evaluations.decision(last)
        champion = evaluations.champion()
        exported, at = checkpoint, last
        if ended is not None:
            ending.early = gate_reason(run)
            get_run_logger().warning(ending.early)
            page.backlog.log(partial(page.set_gate, ending.early))
            roll_back = GATE_DECISION.load(run.store, ended).then == "roll_back"
            if roll_back and champion is not None:
                exported = CHECKPOINT.require_ref(run.store, Partition(run.run_id, champion))
                at = champion
            elif roll_back:
                get_run_logger().warning("there is no champion; checkpoint %d is exported", last)
        outputs = own_outputs_folder(run.config, run.run_id, run.uid)
        begin_stage("export")
        export_weights(run.handle, page.handle, exported, str(outputs), at)
        report = write_report(run, pictures.pictures_id, outputs / "report.png")
        page.backlog.log(lambda: page.log_file(report))
        _write_page(run, page, outputs / "report.html")
        # Short: Prefect's cards cut it off.
        description = f"Mean reward: {_mean(rows[0])} → {_mean(rows[-1])}"
        show(lambda: create_table_artifact(rows, key=f"{key}-epochs", description=description))
    return run.run_id


def _write_page(run: Run, tracked: RunTracker, file: Path) -> None:
    """Write a run's page and log it; damage of an old epoch does not fail a run that is trained."""
    try:
        write_run_page(run, file)
    except StoreError as error:
        get_run_logger().warning("%s could not be written: %s", file, error)
    else:
        tracked.backlog.log(lambda: tracked.log_file(file))


@contextmanager
def _saying_how_to_resume(command: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if recognise_stop(error):
            get_run_logger().warning("Stopped. Committed work is kept. Resume with: %s", command)
        raise


def first_unfinished_epoch(run: Run) -> int:
    """Return the last committed epoch, whose tracking may be incomplete; else the first epoch."""
    committed = run.first_epoch
    while EPOCH.exists(run.store, Partition(run.run_id, committed)):
        committed += 1
    return max(min(committed, run.config.epochs) - 1, run.first_epoch)


def _mean(row: Mapping[str, str]) -> str:
    return row.get("reward/mean", "none")


def _row(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{metrics[name]:.4g}" for name in _SHOWN if name in metrics}
