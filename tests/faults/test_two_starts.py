"""The same run started twice: one trains it, and where both do, the bytes are the same."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import pytest

from ddpo.store import keys
from tests.faults.crashes import RUN, Night
from tests.faults.processes import LIMIT_S, Command, kill

# The first call of a flow waits for a word; the reward is tried before a run starts, too.
HELD_REWARD = """
import pathlib, time
from prefect.runtime import task_run

here = pathlib.Path(__file__).parent

def score(images, prompts):
    if task_run.get_id() and not (here / "held").exists():
        (here / "held").touch()
        while not (here / "go").exists():
            time.sleep(0.05)
    return [float(image.convert("L").getextrema()[1]) for image in images]
"""

# As `ddpo`, but with an owner that is taken for dead after two seconds of silence.
IMPATIENT = """
from ddpo.runs import lease
from ddpo_workflow.flows.cli.app import main

lease.BEAT_S, lease.LOOK_S, lease.SILENCE_S = 0.2, 0.1, 2.0
main()
"""

Start = Callable[[Command], "Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command, which is killed at the end at the latest."""
    with ExitStack() as started:

        def begin(command: Command) -> Popen[bytes]:
            process = command.start()
            started.callback(kill, process)
            return process

        yield begin


@pytest.fixture
def plan(tiny_model: Path, mlflow_database: Path, tmp_path: Path) -> Callable[[str], Command]:
    """Plans the run of a folder, with a reward that waits for the file `go` in it."""

    def named(name: str) -> Command:
        folder = tmp_path / name
        night = Night.plan(
            tiny_model,
            str(folder / "store"),
            folder,
            mlflow_database,
            outputs=str(folder / "outputs"),
            storage={"root": str(folder / "store")},
            reward={"name": "held:score"},
        )
        (folder / "held.py").write_text(HELD_REWARD)
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        return Command(night, folder, {"PYTHONPATH": path})

    return named


def until(holds: Callable[[], object], command: Command) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.05)


def curves(night: Night) -> dict[str, set[tuple[int, float]]]:
    """Return what MLflow shows of the result: not the times, and each point once."""
    shown = night.metrics().items()
    return {
        name: set(points) for name, points in shown if not name.startswith(("time/", "images/"))
    }


def test_of_two_starts_at_once_one_trains_and_the_other_is_refused(
    plan: Callable[[str], Command], start: Start
) -> None:
    command = plan("night")
    first, second = start(command), start(command)
    until(lambda: first.poll() is not None or second.poll() is not None, command)
    refused, trains = (first, second) if first.poll() is not None else (second, first)
    screen = command.log.read_text()
    assert refused.returncode == 2 and trains.poll() is None, screen
    assert f"is being trained by process {trains.pid}" in screen
    assert command.night.store.exists(keys.lease_key(RUN))
    (command.folder / "go").touch()
    assert trains.wait(LIMIT_S) == 0, command.log.read_text()
    assert "SQL" not in command.log.read_text()
    assert [step for step, _ in command.night.metrics()["reward/mean"]] == [0, 1]
    store = command.night.store
    assert not store.exists(keys.lease_key(RUN))
    assert not store.exists(keys.start_key(RUN, 2))


def test_a_killed_run_is_resumed_on_its_machine_without_waiting_for_its_lease(
    plan: Callable[[str], Command], start: Start
) -> None:
    command = plan("night")
    process = start(command)
    until((command.folder / "held").exists, command)
    kill(process)
    assert command.night.store.exists(keys.lease_key(RUN))
    (command.folder / "go").touch()
    assert start(command).wait(LIMIT_S) == 0, command.log.read_text()
    assert "watching" not in command.log.read_text()
    assert not command.night.store.exists(keys.lease_key(RUN))


def test_a_suspended_run_is_taken_over_and_once_it_continues_writes_the_same_bytes(
    plan: Callable[[str], Command], start: Start
) -> None:
    whole = plan("whole")
    (whole.folder / "go").touch()
    assert start(whole).wait(LIMIT_S) == 0, whole.log.read_text()

    command = replace(plan("night"), program=("-c", IMPATIENT))
    suspended = start(command)
    until((command.folder / "held").exists, command)
    until(lambda: command.manifests() >= 3, command)  # a checkpoint, and both shards
    os.kill(suspended.pid, signal.SIGSTOP)  # without its Prefect server, which has another process
    assert start(command).wait(LIMIT_S) == 0, command.log.read_text()
    assert re.search(rf"lease of process {suspended.pid} .* watching", command.log.read_text())

    (command.folder / "go").touch()
    os.kill(suspended.pid, signal.SIGCONT)
    assert suspended.wait(LIMIT_S) == 0, command.log.read_text()
    content = command.night.content()
    assert content == whole.night.content() and len(content) > 20
    assert curves(command.night) == curves(whole.night)
