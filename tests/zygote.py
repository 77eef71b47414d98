"""A process that has imported PyTorch, diffusers and transformers, and forks on demand.

Importing them is most of the CPU time of a tiny run, and some tests start a run many times. A
forked run has its own process group, environment and screen, and imports Prefect and MLflow, which
read the environment, itself: to the operating system and to the run it is a process like any other.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HEAVY = (
    "ddpo.analysis.report",
    "ddpo.models.lora",
    "ddpo.models.stable_diffusion",
    "ddpo.training.loop",
    "matplotlib.figure",
    "pyarrow.dataset",
)


class Forked:
    """A started program, as much of it like `subprocess.Popen` as tests need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit status.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, sign: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, sign)

    def end(self, status: int) -> None:
        """Note the exit status."""
        self.returncode = status
        self._ended.set()


class Zygote:
    """The client of such a process; one per process of pytest."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._forked: dict[int, Forked] = {}
        self._started = threading.Condition()
        self._newest: Forked | None = None
        atexit.register(self._process.kill)
        threading.Thread(target=self._listen, daemon=True).start()

    def start(
        self, module: str, words: list[str], environment: dict[str, str], log: Path
    ) -> Forked:
        """Start `python -m module words` in a process group of its own.

        Args:
            module: What is run.
            words: Its arguments.
            environment: All of its environment.
            log: What its screen is appended to.
        """
        order = {"module": module, "words": words, "environment": environment, "log": str(log)}
        assert self._process.stdin is not None
        with self._started:
            self._newest = None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            self._started.wait_for(lambda: self._newest or self._process.poll() is not None)
            assert self._newest is not None, "the zygote has ended"
            return self._newest

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            with self._started:
                if "status" in said:
                    self._forked.pop(said["pid"]).end(said["status"])
                else:
                    self._newest = self._forked[said["pid"]] = Forked(said["pid"])
                self._started.notify_all()
        with self._started:
            self._started.notify_all()


@functools.cache
def zygote() -> Zygote:
    """Return the one of this process."""
    return Zygote()


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _serve() -> None:
    for name in HEAVY:
        __import__(name)
    gc.freeze()
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            order = json.loads(line)
            ready, begun = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(ready)
                _become(order, begun)
                return
            os.close(begun)
            os.read(ready, 1)  # it leads its group by now
            os.close(ready)
            _say(pid=pid)
        _reap()


def _reap() -> None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    if pid:
        _say(pid=pid, status=os.waitstatus_to_exitcode(status))


def _become(order: dict[str, Any], begun: int) -> None:
    os.setsid()
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        opened = os.open(order["log"] if number else os.devnull, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # without what was read ahead
    os.write(begun, b"!")
    os.close(begun)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(order["environment"])
    time.tzset()
    sys.path[1:1] = order["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = [order["module"], *order["words"]]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
