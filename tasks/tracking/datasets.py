"""Datasets of an MLflow run: which samples and prompts it is about, by digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from urllib.parse import urlsplit

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from ddpo.basics.redaction import hide_credentials

_DIGEST_LENGTH = 36  # MLflow accepts no longer one


def log_dataset(
    client: MlflowClient,
    mlflow_run_id: str,
    *,
    name: str,
    context: str,
    digest: str,
    source: Mapping[str, str],
    rows: int | None,
) -> None:
    """Log a dataset of a run; once per name and digest. See `RunTracker.log_dataset`."""
    scheme = urlsplit(source.get("uri", "")).scheme
    dataset = Dataset(
        name=name,
        digest=digest[:_DIGEST_LENGTH],
        source_type="local" if scheme in {"", "file"} else scheme,
        source=json.dumps({key: hide_credentials(value) for key, value in source.items()}),
        profile=None if rows is None else json.dumps({"num_rows": rows}),
    )
    inputs = client.get_run(mlflow_run_id).inputs
    logged = [entry.dataset for entry in inputs.dataset_inputs] if inputs else []
    if (name, dataset.digest) not in [(entry.name, entry.digest) for entry in logged]:
        tag = InputTag(MLFLOW_DATASET_CONTEXT, context)
        client.log_inputs(mlflow_run_id, [DatasetInput(dataset, [tag])])
