"""Mark the pages of a deleted run as deleted in MLflow."""

from __future__ import annotations

from mlflow.tracking import MlflowClient

from ddpo.basics import trust
from ddpo.basics.redaction import hide_credentials
from ddpo.errors import NotTrusted
from ddpo.store.upkeep.delete import DeletionRecord, TrackedAt
from ddpo_workflow.tasks.tracking.connection import (
    RUN_ID_TAG,
    UID_TAG,
    TrackingError,
    connect,
    find_pages,
    named_errors,
    sqlite_file,
)
from ddpo_workflow.tasks.tracking.description import EVALUATED_TAG, RESCORED_TAG


def delete_pages(record: DeletionRecord) -> list[str]:
    """Mark a run's pages, their adapters, and the pages of its rescored samples as deleted.

    MLflow then hides them; `mlflow runs restore` brings a page back, `mlflow gc` removes it.

    Args:
        record: The run, and where it was shown.

    Returns:
        For each address where that was impossible, the reason.
    """
    failures: list[str] = []
    for place in record.tracked_at if record.uid else ():
        try:
            # The store names the address, and may be somebody else's.
            with trust.acting_for(f"run {record.run_id!r}", record.uid):
                _delete_at(place, record)
        except (TrackingError, NotTrusted) as error:
            failures.append(str(error))
    return failures


def _delete_at(place: TrackedAt, record: DeletionRecord) -> None:
    database = sqlite_file(place.uri)
    if database is not None and not database.exists():
        raise TrackingError(f"there is no database {hide_credentials(place.uri)}")
    client = connect(place.uri)
    shown = f"{place.experiment!r} at {hide_credentials(place.uri)}"
    with named_errors(f"delete the page of {record.run_id!r} in {shown}"):
        experiment = client.get_experiment_by_name(place.experiment)
        if experiment is None or experiment.lifecycle_stage != "active":
            return
        experiment_id = experiment.experiment_id
        own = {RUN_ID_TAG: record.run_id, UID_TAG: record.uid}
        below = [
            page
            for tag in (RESCORED_TAG, EVALUATED_TAG)
            for page in find_pages(client, experiment_id, {tag: record.run_id})
        ]
        pages = [
            *find_pages(client, experiment_id, own),
            # The uid of such a page begins with the run's.
            *(page for page in below if page.data.tags.get(UID_TAG, "").startswith(record.uid)),
        ]
        for page in pages:
            _delete_adapters(client, experiment_id, page.info.run_id)
            client.delete_run(page.info.run_id)


def _delete_adapters(client: MlflowClient, experiment_id: str, mlflow_run_id: str) -> None:
    found = client.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{mlflow_run_id}'"
    )
    for model in found:
        client.delete_logged_model(model.model_id)
