"""Links from Prefect to a page in MLflow."""

from __future__ import annotations

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from ddpo.config import TrackingConfig
from ddpo_workflow.flows.messages import ui_command
from ddpo_workflow.flows.prefect_server import show
from ddpo_workflow.tasks.tracking.connection import is_server
from ddpo_workflow.tasks.tracking.experiment import page_address
from ddpo_workflow.tasks.tracking.tracker import RunTracker


def link_page(page: RunTracker, key: str, name: str) -> None:
    """Add an artifact to the flow run that leads to a page in MLflow.

    Args:
        page: The page.
        key: What the artifact's key begins with.
        name: What the page shows.
    """
    handle, key, description = page.handle, f"{key}-mlflow", f"{name} in MLflow"
    if is_server(handle.uri):
        address = page_address(handle.uri, handle.experiment_id, handle.mlflow_run_id)
        link = f"[{description}]({address})"  # Prefect's lists show the description, and no more
        show(lambda: create_link_artifact(address, link_text=name, key=key, description=link))
        return
    # A file: whoever serves it, and where, is not known.
    address = page_address("", handle.experiment_id, handle.mlflow_run_id)
    command = ui_command(handle.uri, TrackingConfig().uri)
    text = f"`{command}` serves the page of {name}, by default at <http://127.0.0.1:5000{address}>."
    show(lambda: create_markdown_artifact(text, key=key, description=description))
