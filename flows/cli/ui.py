"""Serve the web pages of MLflow and Prefect together, on loopback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

from ddpo.basics.redaction import hide_credentials
from ddpo.errors import DdpoError
from ddpo_workflow.flows.cli.screen import say
from ddpo_workflow.tasks.tracking.connection import client_of, whole_address
from ddpo_workflow.tasks.tracking.experiment import newest_experiment, runs_address

_STARTUP_S = 120.0


class PagesError(DdpoError):
    """The server of a page did not start."""


def serve_pages(tracking: str, *, mlflow_port: int, prefect_port: int) -> None:
    """Serve both pages until SIGINT (Ctrl-C) or SIGTERM.

    Args:
        tracking: MLflow's tracking URI; the address of a server is only printed.
        mlflow_port: Port of MLflow's page.
        prefect_port: Port of Prefect's page.

    Raises:
        PagesError: A server exited, or did not answer in time.
    """
    # Also where the shell ignores SIGINT, as it does for background jobs; and SIGTERM must not
    # leave the servers running.
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.default_int_handler)
    pages: dict[str, str] = {}
    servers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        if tracking.startswith(("http://", "https://")):
            pages["MLflow"] = hide_credentials(tracking)
        else:
            pages["MLflow"] = f"http://127.0.0.1:{mlflow_port}"
            servers["MLflow"] = _start(
                "mlflow", "server", "--backend-store-uri", whole_address(tracking),
                "--host", "127.0.0.1", "--port", str(mlflow_port),
            )  # fmt: skip
        pages["Prefect"] = f"http://127.0.0.1:{prefect_port}"
        servers["Prefect"] = _start(
            "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)
        )
        for name, server in servers.items():
            _wait(name, pages[name], server)
        if "MLflow" in servers:
            experiment = newest_experiment(client_of(tracking))
            pages["MLflow"] = (
                runs_address(pages["MLflow"], experiment) if experiment else pages["MLflow"]
            )
        for name, address in pages.items():
            say(f"{name:8} {address}")
        say("Press Ctrl-C to stop", style="dim")
        while all(server.poll() is None for server in servers.values()):
            time.sleep(0.5)
    except KeyboardInterrupt:
        say("stopped")
    finally:
        for server in servers.values():
            server.terminate()
        for server in servers.values():
            server.wait(timeout=30)


def _start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _wait(name: str, address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _STARTUP_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise PagesError(
        f"{name}'s server at {address} did not start; if the port is in use, choose another with "
        f"--{name.lower()}-port"
    )
