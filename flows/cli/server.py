"""`ddpo server`: Prefect, MLflow, a store to try, and workers, on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ddpo_workflow.flows.cli.screen import busy, say, show_places
from ddpo_workflow.flows.messages import ddpo_command

app = typer.Typer(
    no_args_is_help=True, help="Run Prefect, MLflow, a store and workers in the background."
)

Folder = Annotated[
    Path, typer.Option("--folder", help="Where the servers keep their data and logs.")
]
_FOLDER = Path("ddpo-data/server")


@app.command()
def start(
    folder: Folder = _FOLDER,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.")] = 5000,
    store_port: Annotated[int, typer.Option(help="Port of the store (S3).")] = 8333,
) -> None:
    """Start Prefect, MLflow, a store to try, the deployments and workers, in the background."""
    from ddpo_workflow.flows.server.start import Ports, ServerFolder, start_all

    ports = Ports(prefect=prefect_port, mlflow=mlflow_port, store=store_port)
    with busy("starting") as note:
        running, before = start_all(folder, ports, note)
    say("already running" if before else "running", style="bold")
    show_places(running.shown | {"logs": str(folder / "logs")})
    environment = ServerFolder(folder).environment_file
    bucket = ["storage=s3://ddpo/store"] if "AWS_" in environment.read_text() else []
    say("\nTo start a run, in a shell in this folder:")
    say(f". {shlex.quote(os.path.relpath(environment))}")
    parameters = [word for each in ["epochs=3", *bucket] for word in ("--param", each)]
    say(shlex.join([_prefect(), "deployment", "run", "ddpo-train/train", *parameters]))
    say(ddpo_command("runs", *(["--root", "s3://ddpo/store"] if bucket else [])))
    say("\nTo stop everything:")
    say(ddpo_command("server", "stop", *_named(folder)))


@app.command()
def stop(folder: Folder = _FOLDER) -> None:
    """Stop what `ddpo server start` started; runs under way stop too, and can be resumed."""
    from ddpo_workflow.flows.server.start import stop_all

    with busy("stopping"):
        ended = stop_all(folder)
    say(f"stopped {ended} processes" if ended else f"nothing was running in {folder}")


@app.command("deploy")
def deploy_all() -> None:
    """Create work pools and deployments on the Prefect server that PREFECT_API_URL names."""
    from ddpo.errors import ConfigError
    from ddpo_workflow.flows.server.deploy import POOLS, deploy

    api = os.environ.get("PREFECT_API_URL")
    if not api:
        raise ConfigError(
            "PREFECT_API_URL is not set; it names the server to deploy to, as in "
            "PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    with busy("deploying"):
        deploy(api, os.environ.get("MLFLOW_TRACKING_URI"))
    say(f"deployed prefect.yaml to {api}; its pools are {' and '.join(POOLS)}")


def _named(folder: Path) -> list[str]:
    return [] if folder == _FOLDER else ["--folder", str(folder)]


def _prefect() -> str:
    """Return what calls Prefect in this shell."""
    beside = Path(sys.executable).with_name("prefect")
    found = shutil.which("prefect")
    return "prefect" if found and Path(found).samefile(beside) else str(beside)
