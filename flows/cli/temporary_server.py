"""Prefect's temporary server, which starts beside what else a command has to import.

It is a process of its own (`temporary_server_process`) with the settings of Prefect's ephemeral
mode; this process reaches it like any other server, by `PREFECT_API_URL`. Prefect's own start would
come after all imports, import the whole server into this process as well, and restart a server that
fails silently for two minutes.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

from ddpo.errors import DdpoError

CONFIGURED = "configured"
"""The first word of a process that finds that Prefect's settings name a server."""
FAILED = "failed"
"""What the reason of a process that cannot open its database starts with."""

_ADDRESS = "PREFECT_API_URL"
_POLL_S = 0.05
_STOP_S = 5.0
_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


class ServerNotStarted(DdpoError):
    """Prefect's temporary server did not start; the message says why."""


class TemporaryServer:
    """A temporary server that is starting, or its absence where the user has a server."""

    def __init__(self) -> None:
        """Start the process, with SIGINT blocked.

        A terminal sends Ctrl-C to the server as well, which must outlive this process to record the
        last states of the run. The signal mask is inherited; this process ends it by SIGTERM.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ddpo_workflow.flows.cli.temporary_server_process"],
                env=os.environ | _ENVIRONMENT,
                stdin=subprocess.PIPE,  # it ends when this is closed, however this process ends
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._needed = True
        self._opened = False
        atexit.register(self.stop)

    def adopt(self) -> None:
        """Let this process's Prefect use the server; call it before Prefect is imported.

        Raises:
            ServerNotStarted: The process has ended.
        """
        said = self._next_line()
        self._needed = said != CONFIGURED
        if not self._needed:
            return
        os.environ[_ADDRESS] = f"http://127.0.0.1:{int(said)}/api"
        os.environ["PREFECT_UI_URL"] = ""  # it serves no pages

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerNotStarted: Its database cannot be opened, or it did not answer in time.
        """
        if not self._needed:
            return
        if not self._opened:
            said = self._next_line()
            if said.startswith(FAILED):
                raise ServerNotStarted(said.removeprefix(FAILED).strip())
            self._opened = True  # it says nothing more
        import httpx
        from prefect.settings import get_current_settings

        seconds = get_current_settings().server.ephemeral.startup_timeout_seconds
        deadline = time.monotonic() + seconds
        with httpx.Client() as client:
            while time.monotonic() < deadline and self._process.poll() is None:
                with suppress(httpx.HTTPError):
                    if client.get(f"{os.environ[_ADDRESS]}/health").is_success:
                        return
                time.sleep(_POLL_S)
        raise self._not_started(f"it did not answer within {seconds} s")

    def stop(self) -> None:
        """End the process, if it has not ended."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _next_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise self._not_started("its process ended")
        return line

    def _not_started(self, reason: str) -> ServerNotStarted:
        status = self._process.poll()
        if status is not None:
            reason = f"its process ended with status {status}"
        return ServerNotStarted(
            f"Prefect's temporary server did not start: {reason}. Run `prefect server start` to "
            "see why, and set PREFECT_API_URL to use that server"
        )


_begun: list[TemporaryServer] = []


def begin_server() -> None:
    """Begin to start the temporary server, unless one is named; call it before Prefect is imported.

    Where Prefect is imported already, as in a program that calls a command, nothing is started:
    its settings are read, and it starts a server itself.

    Raises:
        ServerNotStarted: Its process has ended.
    """
    if os.environ.get(_ADDRESS) or _begun or "prefect" in sys.modules:
        return
    server = TemporaryServer()
    _begun.append(server)
    # Needed anyway, and takes as long as the other process takes to read Prefect's settings.
    import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]

    server.adopt()


def start_server() -> None:
    """Start the temporary server, if one is needed, or wait for the one that has begun to start.

    Raises:
        ServerNotStarted: Its database cannot be opened, or it did not answer in time.
    """
    begin_server()
    for server in _begun:
        server.wait()
