"""Experiments in MLflow: opened for model training, with a view of the list of runs."""

from __future__ import annotations

import json
import time
from urllib.parse import urlencode

from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ddpo_workflow.tasks.tracking.connection import TrackingError, named_errors, sqlite_file

COLUMNS = (
    "metrics.`reward/mean`",
    "metrics.`reward/std`",
    "params.`reward`",
    "attributes.`Duration`",
    "attributes.`User`",
    "attributes.`Source`",
)
"""Columns of the list of runs in our view, as MLflow's page names them."""
TRAINING = {"workflowType": "machine_learning"}
"""What an address of MLflow's page ends with; without it, the page opens for GenAI."""

_KIND = "mlflow.experimentKind"
_TRAINING_KIND = "custom_model_development"
_CHOSEN_KINDS = ("custom_model_development", "genai_development")
_VIEW = "ddpo"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"


def find_or_create_experiment(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment `name`, created if it does not exist.

    With a SQLite file, artifacts are kept in `mlartifacts` next to it, wherever the process was
    started; a server chooses its own location.

    Raises:
        TrackingError: The experiment was deleted, or MLflow refuses.
    """
    with named_errors(f"open the experiment {name!r}"):
        experiment = client.get_experiment_by_name(name) or _create(client, name)
        if experiment.lifecycle_stage == "active":
            _complete(client, experiment)
            return experiment.experiment_id
    raise TrackingError(
        f"The MLflow experiment {name!r} was deleted. Restore it (`mlflow experiments restore "
        f"--experiment-id {experiment.experiment_id}`), or choose another name."
    )


def runs_address(server: str, experiment_id: str) -> str:
    """Return the address of an experiment's list of runs in our view.

    Args:
        server: Where MLflow's page is served.
        experiment_id: MLflow's id of the experiment.
    """
    query = urlencode({**TRAINING, "viewStateShareKey": _VIEW})
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"


def page_address(server: str, experiment_id: str, mlflow_run_id: str) -> str:
    """Return the address of a run's page.

    Args:
        server: Where MLflow's page is served.
        experiment_id: MLflow's id of the experiment.
        mlflow_run_id: MLflow's id of the run.
    """
    path = f"experiments/{experiment_id}/runs/{mlflow_run_id}"
    return f"{server.rstrip('/')}/#/{path}?{urlencode(TRAINING)}"


def newest_experiment(client: MlflowClient) -> str | None:
    """Return the id of the experiment with our view that was written last; None without one.

    Raises:
        TrackingError: MLflow refuses.
    """
    with named_errors("list the experiments"):
        found = client.search_experiments(
            filter_string=f"tags.`{_VIEW_TAG}` != ''",
            order_by=["last_update_time DESC"],
            max_results=1,
        )
    return found[0].experiment_id if found else None


def _create(client: MlflowClient, name: str) -> Experiment:
    database = sqlite_file(client.tracking_uri)
    location = (database.parent / "mlartifacts").as_uri() if database else None
    try:
        created = client.create_experiment(name, location, tags={_KIND: _TRAINING_KIND})
    except MlflowException:
        experiment = client.get_experiment_by_name(name)  # of a process that was faster
        if experiment is None:
            raise
        return experiment
    return client.get_experiment(created)


def _complete(client: MlflowClient, experiment: Experiment) -> None:
    """Add what the experiment lacks; what somebody chose is kept."""
    tags = experiment.tags
    if tags.get(_KIND) not in _CHOSEN_KINDS:
        client.set_experiment_tag(experiment.experiment_id, _KIND, _TRAINING_KIND)
    if _VIEW_TAG not in tags:
        client.set_experiment_tag(experiment.experiment_id, _VIEW_TAG, _view())


def _view() -> str:
    """Return a saved view as MLflow's page writes it."""
    now_ms = int(time.time() * 1000)
    state = json.dumps({"selectedColumns": COLUMNS})
    return json.dumps({"name": _VIEW, "createdAt": now_ms, "updatedAt": now_ms, "state": state})
