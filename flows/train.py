"""A whole run: start or go on, epoch by epoch, and hand over what was learnt."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import yaml
from prefect import flow
from prefect.artifacts import (
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run
from pydantic import WithJsonSchema

from ddpo.config import RunConfig
from ddpo.config_files import read_config
from ddpo.report import write_report
from ddpo.run import Run, open_run, start_run, storage_root
from ddpo.store import keys
from ddpo.store.objects import Store
from flows.epoch import EpochPlan, artifact_key, run_epoch
from flows.quiet import without_heartbeats
from tasks.export import export_weights
from tasks.pictures import draw_pictures, picture_set
from tasks.progress import finished_epoch
from tasks.start import start
from tasks.track import TrackingHandle, track_pictures
from tasks.tracking import RunTracker
from tasks.worker import RunHandle, opened

# In Prefect's form, one field that may stay empty; of `str | None` it makes a switch of types.
Text = Annotated[str | None, WithJsonSchema({"type": "string"})]
Whole = Annotated[int | None, WithJsonSchema({"type": "integer"})]
Number = Annotated[float | None, WithJsonSchema({"type": "number"})]

_SHOWN = ("reward/mean", "reward/std", "update/approx_kl", "update/clip_fraction", "time/epoch_s")


def _run_name() -> str:
    """Name a flow run after its run, one without a name so that Prefect's retry goes on with it."""
    asked = flow_run.get_parameters()
    return asked.get("run_id") or f"{_stem(asked['config_file'])}-{(flow_run.get_id() or '')[:8]}"


@flow(name="ddpo-train", flow_run_name=_run_name)
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
    _train(start_run(config, run_id))
    return run_id


@flow(name="ddpo-resume", flow_run_name="{run_id}")
def resume(run_id: str, storage: Text = None, epochs: Whole = None) -> str:
    """Go on with a run as its last start operated it.

    Args:
        run_id: The run's name.
        storage: Folder or URL that remembers it. Empty: the worker's DDPO_ROOT, or the local store.
        epochs: How many epochs it is to have in the end. Empty: as before.

    Returns:
        The run's name.
    """
    config = open_run(Store.open(storage_root(storage)), run_id).config
    changes: dict[str, object] = {
        "storage": config.storage.model_copy(update={"root": storage_root(storage)})
    }
    if epochs is not None:
        changes["epochs"] = epochs
    _train(start_run(config.model_copy(update=changes), run_id))
    return run_id


def new_run_id(config_file: str) -> str:
    """Name a run after its config and the time, to the second."""
    return f"{_stem(config_file)}-{datetime.now():%Y%m%d-%H%M%S}"


def _stem(config_file: str) -> str:
    return Path(config_file).stem.replace("_", "-")


def outputs_folder(config: RunConfig, run_id: str) -> Path:
    """Return the local folder that receives a run's report and weights."""
    return Path(config.outputs) / run_id


def _train(run: Run) -> None:
    opened.cache_clear()  # the operation half may be another than at an earlier start
    handle = RunHandle(root=run.store.root, run_id=run.run_id)
    pictures = picture_set(run, run.config.tracking.pictures)
    page = _open_tracker(run)
    tracking = TrackingHandle(
        uri=run.config.tracking.uri,
        experiment_id=page.experiment_id,
        mlflow_run_id=page.mlflow_run_id,
    )
    plan = EpochPlan(run=handle, tracking=tracking, pictures=pictures, storage=run.config.storage)
    epochs = run.config.epochs
    shown = create_progress_artifact(
        key=f"{artifact_key(run.run_id)}-progress",
        progress=0.0,
        description=f"{run.run_id}: {epochs} epochs",
    )
    outputs = str(outputs_folder(run.config, run.run_id))
    try:
        rows: list[dict[str, str]] = []
        checkpoint = start(handle)
        for epoch in range(epochs):
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
        page.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    page.finish("FINISHED")


def _mean(row: Mapping[str, str]) -> str:
    return row.get("reward/mean", "nothing")


def _row(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{metrics[name]:.4g}" for name in _SHOWN if name in metrics}


def _open_tracker(run: Run) -> RunTracker:
    tracking = run.config.tracking
    page = RunTracker.open(
        tracking_uri=tracking.uri,
        experiment=tracking.experiment,
        run_id=run.run_id,
        params=_parameters(run),
        tags={
            "ddpo.storage_root": run.store.root,
            "ddpo.git_commit": _git_commit(),
            "prefect.flow_run_id": flow_run.get_id() or "",
            "prefect.flow_run_name": flow_run.get_name() or "",
        },
    )
    page.log_rollouts(
        name=f"rollouts-{run.run_id}",
        source_url=run.store.url(keys.rollouts_prefix(run.run_id)),
        digest=run.identity_digest,
        rows=run.config.epochs * run.config.sampler.samples_per_epoch,
        columns={"sample_id": "string", "prompt": "string", "seed": "int64", "image": "binary"},
    )
    _attach_config(page, run)
    if tracking.system_metrics:
        page.start_system_metrics()
    return page


def _parameters(run: Run) -> dict[str, str | int | float | bool]:
    """Return what tells runs apart at a glance; the whole config is attached as a file.

    MLflow prints every parameter above every picture, so there are few and they are short.
    """
    config = run.config
    return {
        "model": config.model.path,
        "trainable": config.trainable.type,
        "prompts": config.prompts.name,
        "reward": config.reward.name,
        "algorithm": config.algorithm.type,
        "advantages": config.advantages.type,
        "learning_rate": config.optimizer.learning_rate,
        "samples_per_epoch": config.sampler.samples_per_epoch,
        "steps": config.sampler.steps,
        "guidance_scale": config.sampler.guidance_scale,
        "seed": config.seed,
    }


def _attach_config(page: RunTracker, run: Run) -> None:
    whole = {**run.config.model_dump(mode="json"), "numerics": run.numerics.model_dump(mode="json")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(whole, sort_keys=False))
        page.log_file(file)


def _git_commit() -> str:
    """Return the commit of the code that runs, empty outside a checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()
