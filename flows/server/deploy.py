"""Work pools and deployments on a Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from ddpo_workflow.flows.server.processes import ServerError

POOLS = {"ddpo-gpu": 1, "ddpo-cpu": 2}
"""How many runs each pool has at a time, until somebody changes it: a run has the GPU alone."""
_NEW_RUNS = ("ddpo-train/train", "ddpo-compare/compare")
"""The deployments that start runs, which no run says where to show."""
FILE = "prefect.yaml"


def check_checkout() -> None:
    """Check that this folder has what is deployed.

    Raises:
        ServerError: It is not a checkout.
    """
    if not Path(FILE).is_file():
        raise ServerError(
            f"there is no {FILE} in {Path.cwd()}; deployments run the code of a checkout, so call "
            "this from its folder"
        )


def deploy(api: str, tracking: str | None) -> None:
    """Create the pools that are missing, and all deployments of `prefect.yaml`.

    A pool that exists stays as it is: its type and limit may have been changed.

    Args:
        api: The address of Prefect's API.
        tracking: The MLflow that new runs are shown in if a form says nothing; None leaves it to
            their configs.

    Raises:
        ServerError: Prefect refuses a deployment.
    """
    check_checkout()
    with SyncPrefectClient(api) as client:
        for name, limit in POOLS.items():
            try:
                client.read_work_pool(name)
            except ObjectNotFound:
                template = ProcessWorker.get_default_base_job_template()
                client.create_work_pool(
                    WorkPoolCreate(
                        name=name,
                        type=ProcessWorker.type,
                        base_job_template=template,
                        concurrency_limit=limit,
                    )
                )
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            env=os.environ | {"PREFECT_API_URL": api},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServerError(
                f"Prefect refused a deployment of {FILE}: {done.stdout}{done.stderr}".strip()
            )
        if tracking:
            for name in _NEW_RUNS:
                found = client.read_deployment_by_name(name)
                parameters = found.parameters | {"tracking": tracking}
                client.update_deployment(found.id, DeploymentUpdate(parameters=parameters))
