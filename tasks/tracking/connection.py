"""Finding the tracking store, the experiment and the run that a `run_id` belongs to.

Everything here goes through `MlflowClient`: MLflow's fluent API keeps the active run in globals and
is not thread-safe, while scoring and updating report from threads of one process.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests
from mlflow.entities import Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from sqlalchemy.engine import make_url

from ddpo.basics.redaction import HIDDEN, USER_INFO, hide_credentials
from ddpo.errors import DdpoError

RUN_ID_TAG = "ddpo.run_id"
"""The tag by which a resumed run finds its MLflow run again."""

_REACH_TIMEOUT_S = 5.0
_PARAM_LIMIT = 500  # MLflow takes 6,000, but its pages print a parameter in full, whatever it is.
_TAG_LIMIT = 8000
_BATCH_LIMIT = 100
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_DATABRICKS = {"databricks", "databricks-uc", "uc"}
_SECRET_NAME = re.compile(
    r"(^|[._/\-])(pass(word|wd|phrase)?|secret|token|credentials?|(api|access|secret|private)_?key)"
    r"([._/\-]|$)",
    re.IGNORECASE,
)


class TrackingError(DdpoError):
    """MLflow cannot be used as asked: the message says what was found and the way out."""


@contextmanager
def named_errors(action: str) -> Iterator[None]:
    """Turns whatever MLflow raises while doing `action` into a `TrackingError`.

    Args:
        action: What was tried, such as `log the metrics of step 3`.

    Raises:
        TrackingError: If MLflow, the network or the disk refused; credentials are taken out of
            the message.
    """
    try:
        yield
    except (MlflowException, requests.RequestException, OSError) as error:
        raise TrackingError(f"MLflow could not {action}: {hide_credentials(str(error))}") from error


def loggable(values: Mapping[str, str | int | float | bool]) -> dict[str, str]:
    """`values` as MLflow stores them: text, without secrets.

    A value is hidden if its name ends or starts in one of password, secret, token, credentials or
    a kind of key (`s3.secret_key`, `judge/token`); credentials inside URLs are hidden too.
    """
    return {
        key: HIDDEN if _SECRET_NAME.search(key) else hide_credentials(str(value))
        for key, value in values.items()
    }


def connect(tracking_uri: str) -> MlflowClient:
    """Opens a tracking store, within seconds or not at all.

    Args:
        tracking_uri: `sqlite:///path/to/mlflow.db` (its folder is made if need be), another
            database, or the `http(s)://` address of an MLflow server.

    Raises:
        TrackingError: If it is a plain folder, if nobody answers at that address within 5 seconds,
            or if the database cannot be opened.
    """
    scheme = urlsplit(tracking_uri).scheme
    if scheme == "file" or (not scheme and tracking_uri not in _DATABRICKS):
        raise TrackingError(
            f"The tracking address {tracking_uri!r} is a plain folder, which MLflow 3.13 and later "
            "refuse. Use a database, such as sqlite:///mlflow.db, or the address of an MLflow "
            "server; `mlflow migrate-filestore` moves the runs of an old folder."
        )
    if scheme in {"http", "https"}:
        _require_answer(tracking_uri)
    with named_errors(f"open {hide_credentials(tracking_uri)}"):
        database = sqlite_file(tracking_uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            tracking_uri = f"sqlite:///{database}"
        return MlflowClient(tracking_uri)


def sqlite_file(tracking_uri: str) -> Path | None:
    """The absolute path of the database file, or None for any other kind of tracking address."""
    if not urlsplit(tracking_uri).scheme.startswith("sqlite"):
        return None
    database = make_url(tracking_uri).database
    return Path(database).resolve() if database and database != ":memory:" else None


def find_or_create_experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment `name`, created if there is none.

    Artifacts of an experiment that is created in a SQLite file lie in `mlartifacts` beside that
    file, wherever the process was started; servers decide for themselves.

    Raises:
        TrackingError: If the experiment was deleted, or MLflow refuses.
    """
    with named_errors(f"open the experiment {name!r}"):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            database = sqlite_file(client.tracking_uri)
            location = (database.parent / "mlartifacts").as_uri() if database else None
            try:
                return client.create_experiment(name, location, tags=_EXPERIMENT_TAGS)
            except MlflowException:
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"The MLflow experiment {name!r} was deleted. Restore it (`mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`), or choose another name."
        )
    return experiment.experiment_id


def find_run(client: MlflowClient, experiment_id: str, run_id: str) -> Run | None:
    """The MLflow run of `run_id`, None where it has none in the experiment.

    Raises:
        TrackingError: If MLflow refuses.
    """
    with named_errors(f"look for the run {run_id!r}"):
        found = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return found[0] if found else None


def find_or_create_run(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    params: Mapping[str, str | int | float | bool],
    tags: Mapping[str, str],
) -> Run:
    """The MLflow run of `run_id`, running, with its parameters and tags.

    A parameter that was logged before keeps its value, as MLflow's parameters do; tags take the
    new one. What is too long to show is cut, and a cut parameter is attached to the run in full,
    as `parameters/<name>.txt`.

    Raises:
        TrackingError: If MLflow refuses.
    """
    with named_errors(f"open the run {run_id!r}"):
        found = find_run(client, experiment_id, run_id)
        run = found or client.create_run(experiment_id, tags={RUN_ID_TAG: run_id})
        mlflow_run_id = run.info.run_id
        if run.info.status != "RUNNING":
            client.update_run(mlflow_run_id, status="RUNNING")
        fresh = {k: v for k, v in loggable(params).items() if k not in run.data.params}
        for key, value in fresh.items():
            if len(value) > _PARAM_LIMIT:
                client.log_text(mlflow_run_id, value, f"parameters/{key}.txt")
        entries = [Param(key, _cut(value, _PARAM_LIMIT)) for key, value in fresh.items()]
        marks = [
            RunTag(key, _cut(value, _TAG_LIMIT))
            for key, value in {**loggable(tags), MLFLOW_RUN_NAME: run_id}.items()
        ]
        for start in range(0, max(len(entries), len(marks)), _BATCH_LIMIT):
            part = slice(start, start + _BATCH_LIMIT)
            client.log_batch(mlflow_run_id, params=entries[part], tags=marks[part])
        return client.get_run(mlflow_run_id)


def _require_answer(address: str) -> None:
    health = f"{USER_INFO.sub('', address).rstrip('/')}/health"
    try:
        status = requests.get(health, timeout=_REACH_TIMEOUT_S, allow_redirects=False).status_code
    except requests.exceptions.SSLError:
        return  # Somebody answers; whether to trust the certificate is for MLflow's settings.
    except requests.RequestException as error:
        found = type(error).__name__
    else:
        if status < 500:
            return
        found = f"status {status}"
    raise TrackingError(
        f"No MLflow server answers at {hide_credentials(address)} within {_REACH_TIMEOUT_S:g} s "
        f"({found}). Start one (`mlflow server --backend-store-uri sqlite:///mlflow.db`), correct "
        "the address, or track into a file: sqlite:///mlflow.db."
    )


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
