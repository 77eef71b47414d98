"""Connect to MLflow; find or create the MLflow run of a `run_id`.

All calls go through `MlflowClient`: MLflow's fluent API keeps the active run in globals, and tasks
log from several threads of a process.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from alembic.util.exc import CommandError
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from pydantic import BaseModel, ConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from ddpo.basics.outages import PATIENCE_S, Outage, patiently
from ddpo.basics.paths import expand
from ddpo.basics.redaction import HIDDEN, NO_PASSWORD, has_password, hide_credentials
from ddpo.basics.trust import check_place
from ddpo.config.operation import check_tracking_uri
from ddpo.errors import DdpoError
from ddpo_workflow.tasks.tracking.origin import origin

RUN_ID_TAG = "ddpo.run_id"
"""The tag with the name of what a page shows."""
UID_TAG = "ddpo.uid"
"""The tag that distinguishes a page from others of the same name, such as another store's run."""
ROOT_TAG = "ddpo.storage_root"
"""The tag with the address of the store."""

_REACH_TIMEOUT_S = 4.0
_UNAVAILABLE_STATUS = frozenset({429, 502, 503, 504})
_UNAVAILABLE_ERRORS = (requests.ConnectionError, requests.Timeout, requests.exceptions.RetryError)
_CONFLICT = "IntegrityError"  # in MLflow's messages, of any database: a row was inserted twice
_PARAM_LIMIT = 500  # MLflow accepts 6,000, but its pages print parameters in full.
TAG_LIMIT = 8000
"""Length of a tag that MLflow accepts."""
_BATCH_LIMIT = 100
_SECRET_NAME = re.compile(
    r"(^|[._/\-])(pass(word|wd|phrase)?|secret|token|credentials?|(api|access|secret|private)_?key)"
    r"([._/\-]|$)",
    re.IGNORECASE,
)


T = TypeVar("T")


class TrackingError(DdpoError):
    """MLflow cannot be reached or refuses a call; the message says how to fix it."""


class TrackingUnavailable(TrackingError):
    """MLflow does not answer, or answers that it is busy: worth another try later."""

    def __init__(self, message: str, reason: str) -> None:
        self.reason = reason
        super().__init__(message)


class TrackingHandle(BaseModel, frozen=True):
    """The address of an MLflow run, as tasks take it."""

    model_config = ConfigDict(extra="forbid")

    uri: str
    """MLflow's tracking URI."""
    experiment_id: str
    """MLflow's id of the experiment."""
    mlflow_run_id: str
    """MLflow's id of the run."""


@contextmanager
def named_errors(action: str) -> Iterator[None]:
    """Turn MLflow's errors during `action` into a `TrackingError`.

    Args:
        action: The action in words, such as `log the metrics of step 3`.

    Raises:
        TrackingUnavailable: The server or the database did not answer, or was busy, or another
            process wrote the same rows at the same time.
        TrackingError: MLflow or the disk failed; neither message has credentials.
    """
    try:
        yield
    except (MlflowException, requests.RequestException, OSError) as error:
        message = f"MLflow could not {action}: {hide_credentials(_without_sql(error))}"
        if reason := _reason_of_absence(error):
            raise TrackingUnavailable(message, reason) from error
        raise TrackingError(message) from error
    # Of a database that is none, or not MLflow's, or whose driver is not installed.
    except (SQLAlchemyError, CommandError, ImportError) as error:
        reason = hide_credentials(_without_sql(error))
        raise TrackingError(f"MLflow could not {action}: {reason}") from error


def _without_sql(error: Exception) -> str:
    """Return an error's message without the statement and the parameters that databases add."""
    return str(error).partition("[SQL:")[0].strip()


def _reason_of_absence(error: Exception) -> str:
    """Return why MLflow is unavailable; '' if the error is of another kind."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, _UNAVAILABLE_ERRORS):
            return type(cause).__name__
    if isinstance(error, MlflowException):
        if _CONFLICT in str(error):
            return "another process wrote the same rows at the same time"
        status = error.get_http_status_code()
        return f"status {status}" if status in _UNAVAILABLE_STATUS else ""
    return ""


def waited_for(tracking_uri: str, call: Callable[[], T]) -> T:
    """Call MLflow, and wait for it if it is unavailable.

    Args:
        tracking_uri: Its address.
        call: What may be called again.

    Raises:
        TrackingUnavailable: It stayed unavailable.
        TrackingError: MLflow refuses.
    """
    outage = Outage(f"MLflow at {hide_credentials(tracking_uri)}")
    return patiently(call, TrackingUnavailable, outage, PATIENCE_S)


def loggable(values: Mapping[str, str | int | float | bool]) -> dict[str, str]:
    """Return `values` as text without secrets.

    A value is hidden if a part of its name is password, secret, token, credentials or a kind of key
    (`s3.secret_key`, `judge/token`); credentials inside URLs are hidden too.
    """
    return {
        key: HIDDEN if _SECRET_NAME.search(key) else hide_credentials(str(value))
        for key, value in values.items()
    }


def connect(tracking_uri: str) -> MlflowClient:
    """Open a tracking store, or fail within seconds.

    Args:
        tracking_uri: `sqlite:///path/to/mlflow.db` (missing folders are created), another
            database, or the `http(s)://` address of an MLflow server.

    Raises:
        TrackingUnavailable: No server answers within seconds.
        TrackingError: The address is a plain folder or contains a password, or the database cannot
            be opened.
        NotTrusted: A stored run from elsewhere names the address.
    """
    if has_password(tracking_uri):
        raise TrackingError(f"The tracking address contains a password; {NO_PASSWORD}.")
    shown = f"it is shown in MLflow at {hide_credentials(tracking_uri)}"
    check_place(shown, tracking_uri, sqlite_file(tracking_uri))
    try:
        check_tracking_uri(tracking_uri)
    except ValueError as error:
        raise TrackingError(str(error)) from error
    if reason := why_unavailable(tracking_uri):
        raise TrackingUnavailable(
            f"No MLflow server answers at {hide_credentials(tracking_uri)} within "
            f"{_REACH_TIMEOUT_S:g} s ({reason}). Start one (`mlflow server --backend-store-uri "
            "sqlite:///mlflow.db`), correct the address, or track into a file: "
            "sqlite:///mlflow.db.",
            reason,
        )
    return client_of(tracking_uri)


def client_of(tracking_uri: str) -> MlflowClient:
    """Open a tracking store; a server need not answer.

    Raises:
        TrackingError: The database cannot be opened.
    """
    if is_server(tracking_uri):
        # MLflow's own, 7, keep a run silent for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with named_errors(f"open {hide_credentials(tracking_uri)}"):
        database = sqlite_file(tracking_uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(whole_address(tracking_uri))


def whole_address(tracking_uri: str) -> str:
    """Return an address that means the same in every folder and for every user of the machine."""
    database = sqlite_file(tracking_uri)
    return tracking_uri if database is None else f"sqlite:///{database}"


def sqlite_file(tracking_uri: str) -> Path | None:
    """Return the absolute path of the database file; None for any other kind of address.

    Raises:
        TrackingError: The address cannot be read.
    """
    if not urlsplit(tracking_uri).scheme.startswith("sqlite"):
        return None
    try:
        database = make_url(tracking_uri).database
    except (SQLAlchemyError, ValueError) as error:
        raise TrackingError(
            f"cannot read the tracking address {hide_credentials(tracking_uri)}; write a database "
            "as sqlite:///mlflow.db, or with its whole path as sqlite:////data/mlflow.db"
        ) from error
    if not database or database == ":memory:":
        return None
    return Path(expand(database)).resolve()


def find_pages(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> list[Run]:
    """Return the MLflow runs of an experiment that have all of these tags, the newest first.

    Args:
        client: The tracking store.
        experiment_id: MLflow's id of the experiment.
        tags: Values by name, as given to `find_or_create_run`; at least one whose value is free of
            quotes.

    Raises:
        TrackingError: MLflow refuses.
    """
    logged = _tags(tags)
    # MLflow's filters have no way to write a value with quotes.
    filters = [f"tags.`{key}` = '{value}'" for key, value in logged.items() if "'" not in value]
    with named_errors(f"look for the run {tags.get(RUN_ID_TAG)!r}"):
        runs = client.search_runs(
            [experiment_id],
            filter_string=" AND ".join(filters),
            order_by=["attributes.start_time DESC"],
        )
    return [run for run in runs if logged.items() <= run.data.tags.items()]


def find_page(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> Run | None:
    """Return the newest of `find_pages`; None if there is none."""
    return next(iter(find_pages(client, experiment_id, tags)), None)


def find_or_create_run(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    uid: str,
    params: Mapping[str, str | int | float | bool],
    tags: Mapping[str, str],
) -> Run:
    """Return the MLflow run of `run_id` and `uid`, marked as running, with parameters and tags.

    A parameter that was logged before keeps its value, as MLflow's parameters do; a tag takes the
    new one. Values that are too long to show are cut, and a cut parameter is attached in full, as
    `parameters/<name>.txt`.

    Raises:
        TrackingError: MLflow refuses.
    """
    with named_errors(f"open the run {run_id!r}"):
        own = {RUN_ID_TAG: run_id, UID_TAG: uid}
        run = find_page(client, experiment_id, own) or _create_page(client, experiment_id, own)
        mlflow_run_id = run.info.run_id
        if run.info.status != "RUNNING":
            client.update_run(mlflow_run_id, status="RUNNING")
        fresh = {k: v for k, v in loggable(params).items() if k not in run.data.params}
        for key, value in fresh.items():
            if len(value) > _PARAM_LIMIT:
                client.log_text(mlflow_run_id, value, f"parameters/{key}.txt")
        new_params = [Param(key, _cut(value, _PARAM_LIMIT)) for key, value in fresh.items()]
        new_tags = [RunTag(*tag) for tag in _tags({**tags, MLFLOW_RUN_NAME: run_id}).items()]
        for start in range(0, max(len(new_params), len(new_tags)), _BATCH_LIMIT):
            part = slice(start, start + _BATCH_LIMIT)
            client.log_batch(mlflow_run_id, params=new_params[part], tags=new_tags[part])
        return client.get_run(mlflow_run_id)


def _create_page(client: MlflowClient, experiment_id: str, own: Mapping[str, str]) -> Run:
    """Create a page that is not there yet; or take one that another process has just created.

    The same run may be started twice at once: both keep the older page.
    """
    created = client.create_run(experiment_id, tags={**_tags(origin()), **own})
    first = find_pages(client, experiment_id, own)[-1]
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)
    return first


def latest_metrics(run: Run) -> Sequence[Metric]:
    """Return the newest entry of each metric of an MLflow run, with its step and timestamp."""
    return [Metric.from_proto(entry) for entry in run.data.to_proto().metrics]


def is_server(tracking_uri: str) -> bool:
    """Return whether an address is that of a server."""
    return urlsplit(tracking_uri).scheme in {"http", "https"}


def why_unavailable(tracking_uri: str, *, within_s: float = _REACH_TIMEOUT_S) -> str:
    """Return why no server answers at an address; '' if one does, or if it is no server's."""
    if not is_server(tracking_uri):
        return ""
    health = f"{tracking_uri.rstrip('/')}/health"
    try:
        status = requests.get(health, timeout=within_s, allow_redirects=False).status_code
    except requests.exceptions.SSLError:
        return ""  # A server answers; MLflow's own settings say whether to trust its certificate.
    except requests.RequestException as error:
        return type(error).__name__
    return "" if status < 500 else f"status {status}"


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags as MLflow keeps them."""
    return {key: _cut(value, TAG_LIMIT) for key, value in loggable(tags).items()}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
