"""One run's page in MLflow: parameters, metrics, images, datasets, adapters.

The store is the record and MLflow the display: nothing logged here is read back by a computation. A
resumed run continues its MLflow run, and nothing is logged twice for one step.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import PIL.Image
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from ddpo_workflow.tasks.stops import recognise_stop
from ddpo_workflow.tasks.tracking import adapters as mlflow_adapters
from ddpo_workflow.tasks.tracking import datasets, registry
from ddpo_workflow.tasks.tracking.backlog import Backlog, backlog
from ddpo_workflow.tasks.tracking.connection import (
    TrackingError,
    TrackingHandle,
    client_of,
    connect,
    find_or_create_run,
    find_page,
    is_server,
    latest_metrics,
    loggable,
    named_errors,
    waited_for,
)
from ddpo_workflow.tasks.tracking.description import FAILURE_TAG, GATE_TAG, write_description
from ddpo_workflow.tasks.tracking.experiment import find_or_create_experiment
from ddpo_workflow.tasks.tracking.system_metrics import SystemMetrics

__all__ = ["RunTracker", "TrackingError", "TrackingHandle", "tracker"]

_METRICS_PER_BATCH = 1000
_BEAT_S = 1.5
_FAILURE_LENGTH = 1000

_logger = logging.getLogger(__name__)


class RunTracker:
    """One run's page in MLflow, open while used as a context.

    A page in use as a context looks every few seconds whether MLflow's server answers, and at its
    end waits until all of its backlog is logged.

    Methods may be called from several threads. Each raises `TrackingError` if MLflow refuses the
    call or cannot be reached; the two for system metrics log a warning instead.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, mlflow_run_id: str) -> None:
        self.experiment_id = experiment_id
        """MLflow's id of the experiment."""
        self.mlflow_run_id = mlflow_run_id
        """MLflow's id of the run, which MLflow chose: our `run_id` is the run's name."""
        self._client = client
        self._lock = threading.Lock()
        self._image_files: set[str] | None = None
        self._texts: dict[str, str] = {}
        self._system_metrics: SystemMetrics | None = None
        self._left = threading.Event()

    @classmethod
    def open(
        cls,
        *,
        tracking_uri: str,
        experiment: str,
        run_id: str,
        uid: str,
        params: Mapping[str, str | int | float | bool],
        tags: Mapping[str, str],
        parent: Mapping[str, str] | None = None,
    ) -> Self:
        """Find the MLflow run of `run_id` and `uid`, or create it, and mark it as running.

        Args:
            tracking_uri: `sqlite:///path/to/mlflow.db`, another database, or an MLflow server's
                `http(s)://` address.
            experiment: The experiment's name; created if it does not exist.
            run_id: The run's id, kept as the tag `ddpo.run_id` and as the name of the MLflow run.
            uid: What distinguishes the run from others of its name, kept as the tag `ddpo.uid`.
            params: Parameters by name. A parameter keeps the value it was first logged with.
                Secrets are hidden; a value over 500 characters is cut and attached in full.
            tags: Tags by name; a resumed run replaces their values.
            parent: Tags of the MLflow run below which this one is nested, if it is here.

        Raises:
            TrackingError: The address is a plain folder, no server answers within seconds, or
                MLflow refuses.
        """
        client = connect(tracking_uri)
        experiment_id = find_or_create_experiment(client, experiment)
        parent_run = find_page(client, experiment_id, parent) if parent else None
        if parent_run:
            tags = {**tags, MLFLOW_PARENT_RUN_ID: parent_run.info.run_id}
        run = find_or_create_run(client, experiment_id, run_id, uid, params, tags)
        page = cls(client, experiment_id, run.info.run_id)
        for tag in {FAILURE_TAG, GATE_TAG} & run.data.tags.keys():
            with named_errors("remove why the run ended before"):
                client.delete_tag(run.info.run_id, tag)
        page.describe()
        return page

    def __enter__(self) -> Self:
        if is_server(self._client.tracking_uri):
            threading.Thread(target=self._watch, name="mlflow", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the MLflow run as finished, failed, or killed if a signal stopped it."""
        try:
            if error is None:
                self.backlog.finish()
                waited_for(self._client.tracking_uri, lambda: self.finish("FINISHED"))
                return
        except BaseException as late:
            self._end(late)
            raise
        finally:
            self._left.set()
            self.stop_system_metrics()
        self._end(error)

    def _end(self, error: BaseException) -> None:
        killed = recognise_stop(error) or not isinstance(error, Exception)
        with suppress(TrackingError):  # MLflow may be what failed; the first error is the one shown
            if killed:
                self.finish("KILLED")
            else:
                self.finish("FAILED", f"{type(error).__name__}: {error}")

    @property
    def handle(self) -> TrackingHandle:
        """The page's address, for tasks."""
        return TrackingHandle(
            uri=self._client.tracking_uri,
            experiment_id=self.experiment_id,
            mlflow_run_id=self.mlflow_run_id,
        )

    @property
    def backlog(self) -> Backlog:
        """What is still to be logged to the page: now, or once MLflow answers again."""
        return backlog(self.handle)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log those of `metrics` that have no value at `step` yet.

        Args:
            metrics: Values by name; MLflow groups charts by the part before `/` (`reward/mean`).
            step: The epoch.
        """
        with self._exclusive(f"log the metrics of step {step}"):
            run = self._client.get_run(self.mlflow_run_id)
            # MLflow keeps the newest entry of each metric with the run, so a whole history is read
            # only for a step in the past.
            latest_steps = {metric.key: metric.step for metric in latest_metrics(run)}
            now_ms = int(time.time() * 1000)
            missing = [
                Metric(key, float(value), now_ms, step)
                for key, value in metrics.items()
                if not self._has_metric(key, step, latest_steps.get(key))
            ]
            for start in range(0, len(missing), _METRICS_PER_BATCH):
                batch = missing[start : start + _METRICS_PER_BATCH]
                self._client.log_batch(self.mlflow_run_id, metrics=batch)

    def steps(self, key: str) -> set[int]:
        """Return the steps at which a metric has a value."""
        with self._exclusive(f"read the metric {key!r}"):
            history = self._client.get_metric_history(self.mlflow_run_id, key)
        return {metric.step for metric in history}

    def images_at(self, step: int) -> int:
        """Return how many images the UI's grid shows at a step."""
        with self._exclusive(f"list the images of step {step}"):
            return sum(f"+step+{step}+" in file and file.endswith(".webp") for file in self._files)

    def log_image(self, key: str, image: PIL.Image.Image, step: int) -> None:
        """Add an image to the UI's grid, which has a slider over steps; once per step.

        Args:
            key: The image's name at every step: letters, digits, `_`, `-`, `.`, `/` and spaces.
            image: The image, of any size and mode.
            step: The epoch.
        """
        # MLflow reads steps from file names: images/<key>+step+<step>+timestamp+<ms>+<id>.png, and
        # <the same>+compressed.webp, which the grid shows.
        prefix = f"images/{key.replace('/', '~')}+step+{step}+"
        with self._exclusive(f"log the image {key!r} of step {step}"):
            files = [path for path in self._files if path.startswith(prefix)]
            originals = [path for path in files if path.endswith(".png")]
            if not originals:
                self._client.log_image(
                    self.mlflow_run_id, image, key=key, step=step, synchronous=True
                )
            elif len(files) == len(originals):
                compressed = f"{originals[0].removesuffix('.png')}+compressed.webp"
                self._client.log_image(
                    self.mlflow_run_id, compress_image_size(image), artifact_file=compressed
                )
            self._files.update({f"{prefix}.png", f"{prefix}.webp"})

    def log_dataset(
        self,
        *,
        name: str,
        context: str,
        digest: str,
        source: Mapping[str, str],
        rows: int | None = None,
    ) -> None:
        """Log a dataset of the run; once per name and digest.

        Args:
            name: The dataset's name.
            context: What it is to the run, such as `rollouts`.
            digest: Digest of its content; MLflow keeps its first 36 characters.
            source: Where it is, by kind; `uri` is shown without credentials.
            rows: Number of its rows, if it is known.
        """
        with self._exclusive(f"log the dataset {name!r}"):
            datasets.log_dataset(
                self._client,
                self.mlflow_run_id,
                name=name,
                context=context,
                digest=digest,
                source=source,
                rows=rows,
            )

    def describe(self) -> None:
        """Write the page's description and the picture of its curve, from what the page shows."""
        with self._exclusive("write the description"):
            write_description(self._client, self.mlflow_run_id)

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
        """Log a LoRA adapter as an MLflow model with its own page; once per name and step.

        The model carries the run's metrics of the same step, if they are the newest.

        Args:
            folder_or_file: `pytorch_lora_weights.safetensors`, or the folder that contains it.
            base_model: The Hub id, or the absolute path, of the model it adapts.
            name: The model's name, without `/`, `:`, `.`, `%` or quotes.
            step: The epoch whose metrics belong to it.
            metadata: Further entries for the model's page; secrets are hidden.
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

    def crown(self, model_uri: str, run_id: str, uid: str, epoch: int) -> None:
        """Give a checkpoint's weights the alias `champion` in MLflow's registry, and say so here.

        An evaluation's page also lets the page of the evaluated run say so.

        Args:
            model_uri: What `log_adapter` returned, or the address of a logged pipeline.
            run_id: The run, after which the registered model is named.
            uid: What distinguishes the run from others of its name.
            epoch: The checkpoint.
        """
        with self._exclusive(f"register checkpoint {epoch} as the champion"):
            registry.crown(self._client, self.mlflow_run_id, model_uri, run_id, uid, epoch)

    def artifact_uri(self, artifact_path: str) -> str:
        """Return the address of a folder of the run's artifacts."""
        with self._exclusive(f"find {artifact_path}"):
            return f"{self._client.get_run(self.mlflow_run_id).info.artifact_uri}/{artifact_path}"

    def set_gate(self, reason: str) -> None:
        """Let the page say why the gate has ended training."""
        with self._exclusive("say why the gate has ended training"):
            for key, value in loggable({GATE_TAG: reason}).items():
                self._client.set_tag(self.mlflow_run_id, key, value)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Attach a text to the run; nothing happens if this process has attached it already."""
        with self._exclusive(f"attach {artifact_file}"):
            if self._texts.get(artifact_file) != text:
                self._client.log_text(self.mlflow_run_id, text, artifact_file)
                self._texts[artifact_file] = text

    def log_folder(self, path: Path, artifact_path: str) -> None:
        """Attach the files in `path` to the run, in the folder `artifact_path` of its artifacts."""
        with self._exclusive(f"attach {path}"):
            self._client.log_artifacts(self.mlflow_run_id, str(path), artifact_path)

    def log_file(self, path: Path, artifact_path: str | None = None) -> None:
        """Attach one file to the run, in the folder `artifact_path` of its artifacts."""
        with self._exclusive(f"attach {path}"):
            self._client.log_artifact(self.mlflow_run_id, str(path), artifact_path)

    def start_system_metrics(self, interval_s: int = 10) -> None:
        """Log CPU, memory, disk, network and GPU use (with `nvidia-ml-py` installed) from a thread.

        A resumed run continues its curves. Logs a warning if monitoring cannot start.

        Args:
            interval_s: Seconds between samples.
        """
        uri = self._client.tracking_uri
        self._system_metrics = SystemMetrics(uri, self.mlflow_run_id, interval_s)
        self._system_metrics.start()

    def stop_system_metrics(self) -> None:
        """Stop monitoring and log the last values, so that even a short run has some."""
        metrics, self._system_metrics = self._system_metrics, None
        if metrics is not None:
            metrics.stop()

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"], failure: str = "") -> None:
        """Stop the system metrics and end the MLflow run; `open` marks it as running again.

        Args:
            status: How it ended.
            failure: The error that ended it, if one did.
        """
        self.stop_system_metrics()
        with self._exclusive(f"end the run as {status}"):
            if failure:
                for key, value in loggable({FAILURE_TAG: failure[:_FAILURE_LENGTH]}).items():
                    self._client.set_tag(self.mlflow_run_id, key, value)
            self._client.set_terminated(self.mlflow_run_id, status)
        self.describe()

    @property
    def _files(self) -> set[str]:
        """The image files that the page has."""
        if self._image_files is None:
            listed = self._client.list_artifacts(self.mlflow_run_id, "images")
            self._image_files = {file.path for file in listed}
        return self._image_files

    def _watch(self) -> None:
        while not self._left.wait(_BEAT_S):
            try:
                if self.backlog.beat() and self._system_metrics is not None:
                    self._system_metrics.start()  # their thread may have ended with the server
            except Exception as error:  # raised again where the run logs something next, or ends
                _logger.warning("cannot log what MLflow missed: %s", error)

    def _has_metric(self, key: str, step: int, latest_step: int | None) -> bool:
        if latest_step is None or latest_step < step:
            return False
        if latest_step == step:
            return True
        history = self._client.get_metric_history(self.mlflow_run_id, key)
        return any(metric.step == step for metric in history)

    @contextmanager
    def _exclusive(self, action: str) -> Iterator[None]:
        # One thread at a time: looking for an entry and logging it must not be interleaved.
        with self._lock, named_errors(action):
            yield


@lru_cache(maxsize=8)
def tracker(handle: TrackingHandle) -> RunTracker:
    """Open a run's page in MLflow, once per process."""
    return RunTracker(client_of(handle.uri), handle.experiment_id, handle.mlflow_run_id)
