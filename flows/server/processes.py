"""Processes that outlive the command that starts them, and are ended by another one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from ddpo.errors import DdpoError

HOST = "127.0.0.1"
"""Everything listens here, and nowhere else."""
_START_S = 180.0
_END_S = 30.0  # a run under way stops within ten seconds
_LOOK_S = 0.2
_TAIL = 15  # lines of a log
_HIGHEST_PORT = 65_535
# Becomes the program once it has read a line, and ends if whoever is to write it has died.
_GATE = 'read -r _ && exec "$@" < /dev/null'


class ServerError(DdpoError):
    """A server cannot be started or stopped; the message says why."""


class Service(BaseModel, frozen=True):
    """A process that was started, as the folder remembers it."""

    name: str
    """What it is, in messages."""
    pid: int
    """Its process id."""
    created_s: float
    """When the process began, which tells it from a later one with the same id."""
    log: Path
    """What it prints."""
    stop_signal: int = signal.SIGTERM
    """What ends it in good order."""
    children_too: bool = False
    """Whether what it has started must be told to end as well: it would wait for that."""

    def process(self) -> psutil.Process | None:
        """Return the process; None if it has ended."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if process.create_time() == self.created_s and _runs(process):
                return process
        return None

    def wait(self, answers: Callable[[], bool]) -> None:
        """Wait until it answers.

        Args:
            answers: Whether it does; an error of the network means no.

        Raises:
            ServerError: It has ended, or does not answer in time; the end of its log is shown.
        """
        deadline = time.monotonic() + _START_S
        while True:
            with suppress(OSError):
                if answers():
                    return
            if self.process() is None:
                raise ServerError(f"{self.name} ended while it started{self._tail()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer within {_START_S:.0f} s{self._tail()}"
                )
            time.sleep(_LOOK_S)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL:]
        return "; the end of " + "\n  ".join([f"{self.log}:", *lines])


def start(
    name: str,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    remember: Callable[[Service], None],
    *,
    account: str | None = None,
    folder: Path | None = None,
    stop_signal: int = signal.SIGTERM,
    children_too: bool = False,
) -> Service:
    """Start a process that this one does not wait for.

    Args:
        name: What it is, in messages.
        command: The program and its arguments.
        log: Gets what it prints.
        environment: Its whole environment.
        remember: Called with the process before the program runs; if this process is killed in the
            meantime, the program never does.
        account: The user that it runs as, if this process may choose one. By default this one's.
        folder: Where it starts. By default here.
        stop_signal: What ends it in good order.
        children_too: Whether what it starts must be told to end as well.
    """
    # A session of its own: Ctrl-C in the terminal of `ddpo server start` must not reach it.
    with log.open("ab") as output:
        started = subprocess.Popen(
            ["/bin/sh", "-c", _GATE, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
            **as_user(account),
        )
    assert started.stdin is not None
    with started.stdin as gate:
        service = Service(
            name=name,
            pid=started.pid,
            created_s=psutil.Process(started.pid).create_time(),
            log=log,
            stop_signal=stop_signal,
            children_too=children_too,
        )
        remember(service)
        gate.write(b"go\n")
    return service


def as_user(account: str | None) -> dict[str, Any]:
    """Return the arguments of `subprocess` that run a program as another user.

    Args:
        account: Its name; None for this process's own user.
    """
    return {} if account is None else {"user": account, "group": account, "extra_groups": []}


def end(service: Service) -> None:
    """End a process and all that it has started, in good order; return when they are gone.

    Args:
        service: What was started; it may have ended.
    """
    process = service.process()
    if process is None:
        return
    try:
        children = process.children(recursive=True)
        process.send_signal(service.stop_signal)
    except psutil.NoSuchProcess:
        return
    if not service.children_too:
        psutil.wait_procs([process], timeout=_END_S)
    left = [process, *children]
    for tell in (psutil.Process.terminate, psutil.Process.kill):
        for each in left:
            # A second signal to the process itself would not be in good order.
            if each != process or tell is psutil.Process.kill:
                with suppress(psutil.NoSuchProcess):
                    tell(each)
        _, left = psutil.wait_procs(left, timeout=_END_S)


def taken(port: int) -> bool:
    """Return whether a port is in use on this machine."""
    with socket.socket() as probe:
        # As servers do: a connection that is still closing does not take a port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def free_port(offset: int = 0) -> int:
    """Return a port that is free.

    Args:
        offset: So much above it, another port is free as well.
    """
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
        if not offset or (port + offset <= _HIGHEST_PORT and not taken(port + offset)):
            return port


def _runs(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    if process.status() != psutil.STATUS_ZOMBIE:
        return True
    with suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    return False
