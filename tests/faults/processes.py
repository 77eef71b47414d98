"""`ddpo train` in processes of their own, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.crashes import RUN, Night
from tests.prefect_homes import prefect_home
from tests.zygote import Forked, zygote

LIMIT_S = 900
COMMAND = ("-m", "ddpo_workflow.flows.cli")

Process = subprocess.Popen[bytes] | Forked


@dataclass(frozen=True)
class Command:
    """A night's run as a user types it.

    Attributes:
        night: What is run.
        folder: Gets the config, Prefect's home and the screen's log.
        environment: More variables, as AWS's.
        program: What Python is to run.
    """

    night: Night
    folder: Path
    environment: dict[str, str]
    program: tuple[str, ...] = COMMAND

    def start(self) -> Process:
        """Start the run or go on with it; the process leads a group of its own."""
        file = self.folder / "config.yaml"
        file.write_text(self.night.config.model_dump_json())
        home = self.folder / "prefect"
        environment = {
            **os.environ,
            "PREFECT_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            **self.environment,
        }
        words = ["train", str(file), "--run-id", RUN]
        if self.program == COMMAND and "PYTHONPATH" not in self.environment:
            prefect_home(home)
            return zygote().start(COMMAND[1], words, environment, self.log)
        with self.log.open("ab") as screen:
            return subprocess.Popen(
                [sys.executable, *self.program, *words],
                env=environment,
                stdout=screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        """What the screen showed, of all starts."""
        return self.folder / "screen.log"

    def run(self) -> int:
        """Start or go on, and wait; returns the exit status."""
        process = self.start()
        try:
            return process.wait(LIMIT_S)
        finally:
            kill(process)

    def run_until_killed(self, manifests: int, seconds: float) -> bool:
        """Start or go on, and kill it.

        Args:
            manifests: How many there are when its time has come.
            seconds: How long after that.

        Returns:
            Whether it was killed; False if it was done before.
        """
        process = self.start()
        try:
            while process.poll() is None and self.manifests() < manifests:
                time.sleep(0.02)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        finally:
            kill(process)
        assert process.returncode == 0, self.log.read_text()
        return False

    def manifests(self) -> int:
        """Return how many there are in the store."""
        return len(self.night.store.list("manifests"))


def kill(process: Process) -> None:
    """End a process and its children (Prefect's temporary server) at once, as a lost machine."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
