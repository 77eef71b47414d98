"""LoRA adapters as MLflow models: each is logged once and has its own page in the UI."""

import importlib.metadata
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow.diffusers
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric, Run
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from ddpo_workflow.tasks.tracking.connection import latest_metrics

STEP_TAG = "ddpo.step"
"""The tag that names the step of the run that an adapter belongs to."""

_REQUIRED = ("diffusers", "transformers", "torch", "peft", "safetensors", "accelerate")


def log_adapter(
    client: MlflowClient,
    run: Run,
    folder_or_file: Path,
    *,
    base_model: str,
    base_model_revision: str | None,
    name: str,
    step: int,
    metadata: Mapping[str, str],
) -> str:
    """Log an adapter as a model of `run`, or find it.

    Does what `mlflow.diffusers.log_model` does, through the client: that function needs the fluent
    API's active run, and queries the Hub for the base model at each call.

    Args:
        client: The tracking store.
        run: The MLflow run, freshly read.
        folder_or_file: The adapter in diffusers' format.
        base_model: Hub id, or absolute path, of the model that the adapter belongs to.
        base_model_revision: The Hub commit that the adapter was trained on.
        name: The model's name in MLflow.
        step: The step; name and step identify an adapter.
        metadata: Further entries for the model's page.

    Returns:
        The model's URI, `models:/<id>`.
    """
    model = _find(client, run, name, step)
    if model is not None and str(model.status) == "READY":
        return model.model_uri
    if model is None:
        # A kill after this leaves a pending model, which the resumed run completes.
        model = client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=run.info.run_id,
            tags={STEP_TAG: str(step)},
            params={"base_model": base_model, "step": str(step), **metadata},
            model_type="lora-adapter",
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        _save(folder, folder_or_file, base_model, base_model_revision, model, run, metadata)
        client.log_model_artifacts(model.model_id, str(folder))
    linked = run.outputs.model_outputs if run.outputs else []
    if model.model_id not in {output.model_id for output in linked}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
    client.log_batch(run.info.run_id, metrics=_metrics_of(run, step, model.model_id))
    description = _description(base_model, base_model_revision, run, step, model.model_uri)
    client.set_logged_model_tags(model.model_id, {MLFLOW_RUN_NOTE: description})
    return client.finalize_logged_model(model.model_id, "READY").model_uri


def _find(client: MlflowClient, run: Run, name: str, step: int) -> LoggedModel | None:
    models = client.search_logged_models(
        [run.info.experiment_id],
        filter_string=f"name = '{name}' AND source_run_id = '{run.info.run_id}'",
    )
    return next((model for model in models if model.tags.get(STEP_TAG) == str(step)), None)


def _save(
    folder: Path,
    folder_or_file: Path,
    base_model: str,
    base_model_revision: str | None,
    model: LoggedModel,
    run: Run,
    metadata: Mapping[str, str],
) -> None:
    description = Model(
        artifact_path=model.artifact_location,
        run_id=run.info.run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
    )
    # Unless the path is absolute, `save_model` asks the Hub for the newest revision, a network call
    # and maybe not the revision that was trained on. So the reference is filled in afterwards.
    mlflow.diffusers.save_model(
        str(folder_or_file),
        str(folder),
        base_model=str(Path("/", base_model)),
        mlflow_model=description,
        metadata=dict(metadata),
        pip_requirements=[_pinned(package) for package in _REQUIRED],
    )
    flavor = description.flavors[mlflow.diffusers.FLAVOR_NAME]
    flavor["base_model"] = base_model
    if base_model_revision is not None:
        flavor["base_model_revision"] = base_model_revision
    description.save(str(folder / MLMODEL_FILE_NAME))


def _description(base_model: str, revision: str | None, run: Run, step: int, uri: str) -> str:
    pinned = f" at revision `{revision}`" if revision else ""
    return (
        f"LoRA adapter for `{base_model}`{pinned}, from step {step} of `{run.info.run_name}`.\n\n"
        f'Load it: `mlflow.diffusers.load_model("{uri}").load_pipeline()`'
    )


def _pinned(package: str) -> str:
    # Without the label of a local build (`+cpu`), which no package index has.
    return f"{package}=={importlib.metadata.version(package).partition('+')[0]}"


def _metrics_of(run: Run, step: int, model_id: str) -> list[Metric]:
    # With timestamp and value unchanged, these link the run's entries to the model.
    return [
        Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=model_id)
        for metric in latest_metrics(run)
        if metric.step == step and not metric.key.startswith("system/")
    ]
