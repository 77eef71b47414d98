"""A whole run: start or go on, epoch by epoch, and hand over what was learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run
from pydantic import WithJsonSchema

from ddpo.analysis.comparison.plan import check_not_shared
from ddpo.analysis.report import write_report
from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.config.s3 import S3Options
from ddpo.errors import ConfigError, MissingObject
from ddpo.runs.forks.records import record_fork
from ddpo.runs.run import Run, open_run, start_run, storage_root
from ddpo.store import keys
from ddpo.store.checkpoints import find_checkpoint
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli.quiet import without_heartbeats
from ddpo_workflow.flows.epoch import EpochPlan, artifact_key, run_epoch
from ddpo_workflow.flows.start import first_checkpoint
from ddpo_workflow.flows.stopping import mark_stopped, note_begun, notice, resume_command
from ddpo_workflow.tasks.export_weights import export_weights
from ddpo_workflow.tasks.pictures import draw_pictures, picture_set
from ddpo_workflow.tasks.progress import finished_epoch
from ddpo_workflow.tasks.tracking.epochs import TrackingHandle, track_pictures
from ddpo_workflow.tasks.tracking.page import open_page
from ddpo_workflow.tasks.tracking.tracker import TrackingError
from ddpo_workflow.tasks.worker import RunHandle, opened

# In Prefect's form, one field that may stay empty; of `str | None` it makes a switch of types.
Text = Annotated[str | None, WithJsonSchema({"type": "string"})]
Whole = Annotated[int | None, WithJsonSchema({"type": "integer"})]
Number = Annotated[float | None, WithJsonSchema({"type": "number"})]
Parameters = Annotated[
    Mapping[str, Any] | None, WithJsonSchema({"type": "object", "additionalProperties": True})
]

_SHOWN = ("reward/mean", "reward/std", "update/approx_kl", "update/clip_fraction", "time/epoch_s")


def _run_name() -> str:
    """Name a flow run after its run, one without a name so that Prefect's retry goes on with it."""
    asked = flow_run.get_parameters()
    return asked.get("run_id") or f"{_stem(asked['config_file'])}-{(flow_run.get_id() or '')[:8]}"


@flow(
    name="ddpo-train",
    flow_run_name=_run_name,
    on_running=[note_begun],
    on_crashed=[mark_stopped],
    on_failure=[mark_stopped],
)
def train(
    config_file: str = "configs/starter.yaml",
    run_id: Text = None,
    epochs: Whole = None,
    seed: Whole = None,
    learning_rate: Number = None,
    storage: Text = None,
    tracking: Text = None,
    overrides: Sequence[str] = (),
) -> str:
    """Fine-tune a diffusion model on a reward.

    Args:
        config_file: A YAML file; `configs/` holds some.
        run_id: The run's name; that of an existing run goes on with it. Empty: a new name.
        epochs: Rounds of sampling and updating. Empty: the config's.
        seed: What everything random is derived from. Empty: the config's.
        learning_rate: Step size of AdamW. Empty: the config's.
        storage: Folder or URL that remembers the run, as `s3://bucket/prefix`. Empty: the config's.
        tracking: MLflow's tracking URI, as `http://host:5000`. Empty: the config's.
        overrides: Any other setting, one an item, as `sampler.steps=20`.

    Returns:
        The run's name.
    """
    form = {
        "epochs": epochs,
        "seed": seed,
        "optimizer.learning_rate": learning_rate,
        "storage.root": storage,
        "tracking.uri": tracking,
    }
    named = [f"{name}={value}" for name, value in form.items() if value is not None]
    config = read_config(config_file, [*named, *overrides])
    run_id = run_id or _run_name()
    check_not_shared(Store.open(storage_root(config.storage.root), config.storage.s3), run_id)
    train_run(start_run(config, run_id))
    return run_id


@flow(
    name="ddpo-resume",
    flow_run_name="{run_id}",
    on_running=[note_begun],
    on_crashed=[mark_stopped],
    on_failure=[mark_stopped],
)
def resume(run_id: str, storage: Text = None, epochs: Whole = None) -> str:
    """Go on with a run as its last start operated it.

    Args:
        run_id: The run's name.
        storage: Folder or URL that remembers it. Empty: the worker's DDPO_ROOT, or the local store.
        epochs: How many epochs it is to have in the end. Empty: as before.

    Returns:
        The run's name.
    """
    store = Store.open(storage_root(storage))
    check_not_shared(store, run_id)
    config = open_run(store, run_id).config
    changes: dict[str, object] = {
        # Found by its address and the AWS variables, and not by what an earlier start was told.
        "storage": config.storage.model_copy(
            update={"root": storage_root(storage), "s3": S3Options()}
        )
    }
    if epochs is not None:
        if epochs < 1:
            raise ConfigError(f"epochs is {epochs}; a run has at least 1")
        changes["epochs"] = epochs
    train_run(start_run(config.model_copy(update=changes), run_id))
    return run_id


def new_run_id(config_file: str) -> str:
    """Name a run after its config and the time, to the second."""
    return f"{_stem(config_file)}-{datetime.now():%Y%m%d-%H%M%S}"


def _stem(config_file: str) -> str:
    return Path(config_file).stem.replace("_", "-")


def outputs_folder(config: RunConfig, run_id: str) -> Path:
    """Return the local folder that receives a run's report and weights."""
    return Path(config.outputs) / run_id


def train_run(run: Run) -> None:
    """Start a run or go on with it, epoch by epoch, and hand over what was learnt.

    Args:
        run: The run, as this start operates it.
    """
    opened.cache_clear()  # the operation half may be another than at an earlier start
    record_fork(run)  # here, so that a resume of one that was killed before it does, too
    handle = RunHandle(root=run.store.root, s3=run.store.s3, run_id=run.run_id)
    pictures = picture_set(run, run.config.tracking.pictures)
    shown = create_progress_artifact(
        key=f"{artifact_key(run.run_id)}-progress",
        progress=0.0,
        description=f"{run.run_id}: {run.config.epochs} epochs",
    )
    page = open_page(run, flow_run_id=flow_run.get_id(), flow_run_name=flow_run.get_name())
    tracking = TrackingHandle(
        uri=run.config.tracking.uri,
        experiment_id=page.experiment_id,
        mlflow_run_id=page.mlflow_run_id,
    )
    plan = EpochPlan(run=handle, tracking=tracking, pictures=pictures, storage=run.config.storage)
    epochs = run.config.epochs
    outputs = str(outputs_folder(run.config, run.run_id))
    try:
        rows: list[dict[str, str]] = []
        first = _first_epoch(run)
        begun = first > run.first_epoch
        checkpoint = committed_checkpoint(run, first) if begun else first_checkpoint(run, handle)
        for epoch in range(first, epochs):
            with without_heartbeats():  # this flow has its own
                outcome = run_epoch(plan, checkpoint, epoch)
            checkpoint = outcome.checkpoint
            finished_epoch(epoch + 1, epochs, outcome.metrics)
            rows.append({"epoch": str(epoch), **_row(outcome.metrics)})
            update_progress_artifact(shown, progress=100.0 * (epoch + 1) / epochs)  # pyright: ignore
            if (epoch + 1) % run.config.tracking.adapter_every == 0 and epoch + 1 < epochs:
                export_weights(handle, tracking, checkpoint, None, epoch + 1)
        last = draw_pictures(handle, checkpoint, pictures, epochs)
        track_pictures(handle, tracking, last, epochs)
        export_weights(handle, tracking, checkpoint, outputs, epochs)
        page.log_file(write_report(run, pictures.pictures_id, Path(outputs) / "report.png"))
        create_table_artifact(
            key=f"{artifact_key(run.run_id)}-epochs",
            table=rows,
            description=f"Mean reward: {_mean(rows[0])}, in the end {_mean(rows[-1])}",
        )
    except BaseException as error:
        killed = notice(error)
        if killed:
            again = resume_command(run.store, run.run_id)
            get_run_logger().warning("Stopped; what is committed is kept. Go on with: %s", again)
        # MLflow may be what failed; the first error is the one to tell.
        with suppress(TrackingError):
            page.finish("KILLED" if killed or not isinstance(error, Exception) else "FAILED")
        raise
    page.finish("FINISHED")


def committed_checkpoint(run: Run, epoch: int) -> Ref:
    """Return a checkpoint that must be there, since a later epoch is committed."""
    found = find_checkpoint(run.store, run.run_id, epoch)
    if found is None:
        raise MissingObject(keys.checkpoint_manifest_key(run.run_id, epoch), run.store.root)
    return found.ref


def _first_epoch(run: Run) -> int:
    """Return the last committed epoch, which may lack its tracking; all before it are whole."""
    committed = run.first_epoch
    while run.store.exists(keys.epoch_manifest_key(run.run_id, committed)):
        committed += 1
    return max(min(committed, run.config.epochs) - 1, run.first_epoch)


def _mean(row: Mapping[str, str]) -> str:
    return row.get("reward/mean", "nothing")


def _row(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{metrics[name]:.4g}" for name in _SHOWN if name in metrics}
