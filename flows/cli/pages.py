"""`ddpo ui` and `ddpo report`: what a browser shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpo_workflow.flows.cli.common import Root, RunId, saved_run
from ddpo_workflow.flows.cli.screen import busy, say

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


@app.command()
def report(
    run_id: RunId,
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write. By default R.html in this folder.", dir_okay=False),
    ] = None,
    root: Root = None,
) -> None:
    """Write a run's report as one HTML file: rewards, images, prompts, statistics, settings."""
    from ddpo.errors import ConfigError
    from ddpo_workflow.flows.report import write_run_page

    run = saved_run(run_id, root)
    file = out or Path(f"{run_id}.html")
    try:
        with busy("writing"):
            write_run_page(run, file)
    except OSError as error:
        raise ConfigError(f"--out {file} cannot be written: {error.strerror}") from error
    say(str(file))
