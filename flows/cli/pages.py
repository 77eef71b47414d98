"""`ddpo ui`: the web pages of MLflow and Prefect."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def ui(
    tracking: Annotated[
        str, typer.Option(help="MLflow's tracking URI.")
    ] = "sqlite:///ddpo-data/mlflow.db",
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's page.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's page.")] = 4200,
) -> None:
    """Serve the web pages of MLflow and Prefect, until Ctrl-C."""
    from ddpo_workflow.flows.cli.ui import serve_pages

    serve_pages(tracking, mlflow_port=mlflow_port, prefect_port=prefect_port)
