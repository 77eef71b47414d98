"""A run's champion in MLflow: one registered model a run with one alias, and who says so."""

from __future__ import annotations

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from ddpo_workflow.tasks.tracking.description import CHAMPION_TAG, EVALUATED_TAG, write_description

ALIAS = "champion"
"""The alias of the best checkpoint's version."""

_UID_TAG, _EPOCH_TAG = "ddpo.uid", "ddpo.epoch"
_MODEL_PREFIX = "models:/"


def crown(
    client: MlflowClient, mlflow_run_id: str, model_uri: str, run_id: str, uid: str, epoch: int
) -> None:
    """Register a checkpoint's weights, once, move the alias to them, and say so on the run's page.

    Args:
        client: The tracking store, which is the registry too.
        mlflow_run_id: The page that has the weights: the run's, or an evaluation's below it.
        model_uri: `models:/<id>` of the adapter, or where a whole pipeline is.
        run_id: The run, after which the registered model is named.
        uid: What distinguishes the run from others of its name.
        epoch: The checkpoint.
    """
    name = _registered_model(client, run_id, uid)
    found = client.search_model_versions(f"name = '{name}'")
    version = next((each for each in found if each.tags.get(_EPOCH_TAG) == str(epoch)), None)
    if version is None:
        source, model_id = model_uri, None
        if model_uri.startswith(_MODEL_PREFIX):
            # By its folder: MLflow would look for the id under the address of the whole process.
            model_id = model_uri.removeprefix(_MODEL_PREFIX)
            source = client.get_logged_model(model_id).artifact_location
        version = client.create_model_version(
            name,
            source=source,
            run_id=mlflow_run_id,
            tags={_EPOCH_TAG: str(epoch)},
            model_id=model_id,
        )
    client.set_registered_model_alias(name, ALIAS, version.version)
    text = f"Champion: checkpoint {epoch}, `{_MODEL_PREFIX}{name}@{ALIAS}`"
    for page in _pages_of(client, mlflow_run_id):
        client.set_tag(page, CHAMPION_TAG, text)
        write_description(client, page)


def _pages_of(client: MlflowClient, mlflow_run_id: str) -> list[str]:
    """Return a page and, if it is an evaluation's, that of the evaluated run if there is one."""
    tags = client.get_run(mlflow_run_id).data.tags
    above = tags.get(MLFLOW_PARENT_RUN_ID) if EVALUATED_TAG in tags else None
    return [mlflow_run_id, above] if above else [mlflow_run_id]


def _registered_model(client: MlflowClient, run_id: str, uid: str) -> str:
    """Return the name of a run's registered model; created if it is not there.

    A second run of the same name, from another store, gets a longer name.
    """
    for name in (run_id, f"{run_id}-{uid[:8]}"):
        try:
            return client.create_registered_model(name, tags={_UID_TAG: uid}).name
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        if client.get_registered_model(name).tags.get(_UID_TAG) == uid:
            return name
    raise AssertionError(f"two runs have the uid {uid}")
