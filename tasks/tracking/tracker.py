"""What a run shows in MLflow: parameters, curves, pictures, rollouts, adapters.

MLflow shows, the store remembers: nothing here is read back to compute with. A run that was killed
and resumed continues its MLflow run, and what was logged for a step is not logged again.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

import PIL.Image
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from ddpo_workflow.tasks.tracking import adapters as mlflow_adapters
from ddpo_workflow.tasks.tracking.connection import (
    TrackingError,
    connect,
    find_or_create_experiment,
    find_or_create_run,
    find_run,
    hide_credentials,
    loggable,
    named_errors,
)

__all__ = ["RunTracker", "TrackingError"]

_METRICS_PER_BATCH = 1000
_DATASET_DIGEST_LENGTH = 36
_COLUMN_TYPES = {"int32": "integer", "int64": "long", "bool": "boolean", "large_string": "string"}

_logger = logging.getLogger(__name__)


class RunTracker:
    """One run's page in MLflow. Its methods may be called from several threads.

    Each raises `TrackingError` where MLflow refuses or is gone; the two for system metrics warn
    instead.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, mlflow_run_id: str) -> None:
        self.experiment_id = experiment_id
        """MLflow's id of the experiment."""
        self.mlflow_run_id = mlflow_run_id
        """MLflow's id of the run, which MLflow chose: our `run_id` is the run's name."""
        self._client = client
        self._lock = threading.Lock()
        self._picture_files: set[str] | None = None
        self._monitor: SystemMetricsMonitor | None = None

    @classmethod
    def open(
        cls,
        *,
        tracking_uri: str,
        experiment: str,
        run_id: str,
        params: Mapping[str, str | int | float | bool],
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> Self:
        """Finds the MLflow run of `run_id`, or creates it, and sets it running.

        Args:
            tracking_uri: `sqlite:///path/to/mlflow.db`, another database, or an MLflow server's
                `http(s)://` address.
            experiment: The experiment's name; created if there is none.
            run_id: The run's id, kept as the tag `ddpo.run_id` and as the name of the MLflow run.
            params: The resolved config, flat. A parameter is logged once, and keeps its first
                value; secrets are hidden; beyond 500 characters it is cut, and attached in full.
            tags: What may differ from start to start (engine, host); the newest wins.
            parent: Id of the run below whose page this one is shown, if that has a page here.

        Raises:
            TrackingError: If the address is a plain folder, if no server answers within 5 seconds,
                or if MLflow refuses.
        """
        client = connect(tracking_uri)
        experiment_id = find_or_create_experiment(client, experiment)
        above = find_run(client, experiment_id, parent) if parent else None
        marks = {**tags, MLFLOW_PARENT_RUN_ID: above.info.run_id} if above else tags
        run = find_or_create_run(client, experiment_id, run_id, params, marks)
        return cls(client, experiment_id, run.info.run_id)

    def run_url(self, ui_address: str) -> str:
        """The address of the run's page, given the UI's (`http://127.0.0.1:5000`)."""
        run = f"experiments/{self.experiment_id}/runs/{self.mlflow_run_id}"
        return f"{ui_address.rstrip('/')}/#/{run}?workflowType=machine_learning"

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs those of `metrics` that have no value at `step` yet.

        Args:
            metrics: Values by name; `/` groups charts by what stands before it (`reward/mean`).
            step: The epoch, or whatever the curves' horizontal axis counts.
        """
        with self._exclusive(f"log the metrics of step {step}"):
            run = self._client.get_run(self.mlflow_run_id)
            # MLflow keeps the entry of the largest step beside each run (the public `data.metrics`
            # drops its step), so whole histories are read only for a step that lies in the past.
            latest_steps = {metric.key: metric.step for metric in run.data._metric_objs}
            now_ms = int(time.time() * 1000)
            missing = [
                Metric(key, float(value), now_ms, step)
                for key, value in metrics.items()
                if not self._has_metric(key, step, latest_steps.get(key))
            ]
            for start in range(0, len(missing), _METRICS_PER_BATCH):
                batch = missing[start : start + _METRICS_PER_BATCH]
                self._client.log_batch(self.mlflow_run_id, metrics=batch)

    def log_picture(self, key: str, image: PIL.Image.Image, step: int) -> None:
        """Adds a picture to the UI's image grid, whose slider runs over the steps; once a step.

        Args:
            key: The picture's name at every step: letters, digits, `_`, `-`, `.`, `/` and spaces.
            image: Any size and mode.
            step: The epoch.
        """
        # MLflow finds steps in file names: images/<key>+step+<step>+timestamp+<ms>+<id>.png, and
        # beside it <the same>+compressed.webp, which the grid shows.
        prefix = f"images/{key.replace('/', '~')}+step+{step}+"
        with self._exclusive(f"log the picture {key!r} of step {step}"):
            if self._picture_files is None:
                listed = self._client.list_artifacts(self.mlflow_run_id, "images")
                self._picture_files = {file.path for file in listed}
            found = [path for path in self._picture_files if path.startswith(prefix)]
            originals = [path for path in found if path.endswith(".png")]
            if not originals:
                self._client.log_image(
                    self.mlflow_run_id, image, key=key, step=step, synchronous=True
                )
            elif len(found) == len(originals):
                small = compress_image_size(image)
                shown = f"{originals[0].removesuffix('.png')}+compressed.webp"
                self._client.log_image(self.mlflow_run_id, small, artifact_file=shown)
            self._picture_files |= {f"{prefix}.png", f"{prefix}.webp"}

    def log_rollouts(
        self, *, name: str, source_url: str, digest: str, rows: int, columns: Mapping[str, str]
    ) -> None:
        """Names the rollouts as a dataset that the run used; once a name.

        Args:
            name: Such as `rollouts-epoch-00003`.
            source_url: Where they lie in the object store; shown without credentials.
            digest: Their digest; MLflow keeps its first 36 characters.
            rows: How many samples.
            columns: Type by column, as Arrow writes types.
        """
        scheme = urlsplit(source_url).scheme
        colspec = [
            {"type": _COLUMN_TYPES.get(kind, kind), "name": column, "required": True}
            for column, kind in columns.items()
        ]
        dataset = Dataset(
            name=name,
            digest=digest[:_DATASET_DIGEST_LENGTH],
            source_type="local" if scheme == "file" else scheme,
            source=json.dumps({"uri": hide_credentials(source_url)}),
            schema=json.dumps({"mlflow_colspec": colspec}),
            profile=json.dumps({"num_rows": rows}),
        )
        with self._exclusive(f"log the rollouts {name!r}"):
            inputs = self._client.get_run(self.mlflow_run_id).inputs
            known = {entry.dataset.name for entry in inputs.dataset_inputs} if inputs else set()
            if name not in known:
                context = InputTag(MLFLOW_DATASET_CONTEXT, "rollouts")
                self._client.log_inputs(self.mlflow_run_id, [DatasetInput(dataset, [context])])

    def log_adapter(
        self,
        folder_or_file: Path,
        *,
        base_model: str,
        name: str,
        step: int,
        metadata: Mapping[str, str | int | float | bool] | None = None,
        base_model_revision: str | None = None,
    ) -> str:
        """Logs a LoRA adapter as an MLflow model with a page of its own; once a name and step.

        The model carries the run's metrics of the same step, if they are the newest.

        Args:
            folder_or_file: `pytorch_lora_weights.safetensors`, or the folder that has it.
            base_model: The Hub id, or the absolute path, of the model it adapts.
            name: The model's name: no `/`, `:`, `.`, `%` or quotes.
            step: The epoch whose metrics belong to it.
            metadata: More to show on the model's page; secrets are hidden.
            base_model_revision: The Hub commit of `base_model`.

        Returns:
            The model's URI, `models:/<id>`, for `mlflow.diffusers.load_model`.
        """
        with self._exclusive(f"log the adapter {name!r} of step {step}"):
            return mlflow_adapters.log_adapter(
                self._client,
                self._client.get_run(self.mlflow_run_id),
                folder_or_file,
                base_model=base_model,
                base_model_revision=base_model_revision,
                name=name,
                step=step,
                metadata=loggable(metadata or {}),
            )

    def log_folder(self, path: Path, artifact_path: str) -> None:
        """Attaches the files in `path` to the run, in `artifact_path` of its artifacts."""
        with self._exclusive(f"attach {path}"):
            self._client.log_artifacts(self.mlflow_run_id, str(path), artifact_path)

    def log_file(self, path: Path, artifact_path: str | None = None) -> None:
        """Attaches one file to the run, in the folder `artifact_path` of its artifacts."""
        with self._exclusive(f"attach {path}"):
            self._client.log_artifact(self.mlflow_run_id, str(path), artifact_path)

    def start_system_metrics(self, interval_s: int = 10) -> None:
        """Samples CPU, memory, disk, network and GPU (with `nvidia-ml-py` installed) in a thread.

        Continues the curves of a resumed run. Warns if it cannot start.

        Args:
            interval_s: Seconds between samples.
        """
        try:
            self._monitor = SystemMetricsMonitor(
                self.mlflow_run_id,
                sampling_interval=interval_s,
                resume_logging=True,
                tracking_uri=self._client.tracking_uri,
            )
            self._monitor.start()
        except Exception as error:
            _logger.warning("System metrics are not logged: %s", error)

    def stop_system_metrics(self) -> None:
        """Stops sampling and logs the rest, so that even a short run has some; warns at worst."""
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return
        try:
            monitor.finish()
            monitor.collect_metrics()
            if rest := monitor.aggregate_metrics():
                monitor.publish_metrics(rest)
                monitor.mlflow_logger.flush()
        except Exception as error:
            _logger.warning("The last system metrics were not logged: %s", error)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Stops the system metrics and ends the MLflow run; `open` sets it running again."""
        self.stop_system_metrics()
        with self._exclusive(f"end the run as {status}"):
            self._client.set_terminated(self.mlflow_run_id, status)

    def _has_metric(self, key: str, step: int, latest_step: int | None) -> bool:
        if latest_step is None or latest_step < step:
            return False
        if latest_step == step:
            return True
        history = self._client.get_metric_history(self.mlflow_run_id, key)
        return any(metric.step == step for metric in history)

    @contextmanager
    def _exclusive(self, action: str) -> Iterator[None]:
        # One thread at a time: "is it there already?" and the logging belong together.
        with self._lock, named_errors(action):
            yield
