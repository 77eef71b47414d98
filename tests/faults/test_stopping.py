"""Ctrl-C and SIGTERM: cancelled, told how to go on, gone within ten seconds, nothing left over."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State

from ddpo_workflow.flows.hooks import mark_cancelled
from ddpo_workflow.tasks.stops import is_stop
from tests.faults.processes import COMMAND, Process
from tests.prefect_homes import prefect_home
from tests.sweeps import swept
from tests.zygote import zygote

START_LIMIT_S = 900.0
STOP_LIMIT_S = 30.0  # its own timers end it in 8 s; a busy machine takes longer to

SLOW_REWARD = """
import pathlib, time
from prefect.runtime import task_run

def score(images, prompts):
    if not task_run.get_id():  # asked before the run starts
        return [0.0] * len(images)
    pathlib.Path(__file__).with_name("stuck").touch()
    time.sleep(600)
"""

DEAF_PROMPTS = """
import pathlib, time
from prefect.runtime import flow_run

def animals():
    while flow_run.get_id():
        pathlib.Path(__file__).with_name("stuck").touch()
        try:
            time.sleep(600)
        except BaseException:
            pass
    return ["a cat", "a dog"]
"""

SLOW_CHECK = """
import pathlib, time

def animals():
    pathlib.Path(__file__).with_name("checking").touch()
    time.sleep(600)
"""

# A run that is stopped before its name is taken, or just after.
STOPPED = """
import os, signal, sys
from ddpo.config.files import read_config
from ddpo.runs import check_run
from ddpo_workflow.flows.cli.quiet import set_defaults
from ddpo_workflow.flows.cli.running import show_run

set_defaults()
plan = check_run(read_config("configs/starter.yaml", sys.argv[2:]), "night")

def train():
    if sys.argv[1] == "begun":
        plan.start()
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()

show_run(plan, train)
"""


class Started:
    """A run in a process group of its own, with a Prefect home of its own."""

    def __init__(self, folder: Path, model: Path, *settings: str) -> None:
        self.folder = folder
        self.settings = [
            f"model={{path: {model}}}",
            "sampler.steps=2",
            "sampler.window=null",
            "rollouts.samples_per_epoch=4",
            "rollouts.shard_size=2",
            "numerics.sample_batch_size=2",
            "numerics.micro_batch_size=2",
            "numerics.threads=1",
            "algorithm.updates_per_epoch=2",
            "epochs=3",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            "tracking.system_metrics=false",
            f"outputs={folder}/outputs",
            *settings,
        ]
        self.environment = {
            **os.environ,
            "PREFECT_HOME": prefect_home(folder / "prefect"),
            "DDPO_ROOT": str(folder / "store"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
        }
        self.log = folder / "screen.log"

    def train_command(self) -> list[str]:
        words = [word for setting in self.settings for word in ("--set", setting)]
        train = ["train", "configs/starter.yaml", "--run-id", "night"]
        return [sys.executable, *COMMAND, *train, *words]

    def start(self, command: list[str]) -> Process:
        """Start a command, in a process group of its own."""
        if command[1:3] == [*COMMAND]:
            return zygote().start(COMMAND[1], command[3:], self.environment, self.log)
        with self.log.open("w") as stream:
            return subprocess.Popen(
                command,
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def screen(self) -> str:
        return self.log.read_text()

    @contextmanager
    def running(self, command: list[str], until: Callable[[], object]) -> Iterator[None]:
        """Run a command meanwhile; entered once `until` holds, at the latest killed at the end."""
        self.log.unlink(missing_ok=True)
        self.process = self.start(command)
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while not until():
                assert self.process.poll() is None, self.screen
                assert time.monotonic() < deadline, self.screen
                time.sleep(0.05)
            yield
        finally:
            for process in self.group():
                process.kill()
            self.process.wait(30)

    def stop(self, sign: signal.Signals) -> int:
        """Send a signal as a terminal or an operator does; returns the exit status."""
        began = time.monotonic()
        if sign == signal.SIGINT:
            os.killpg(self.process.pid, sign)  # a terminal sends it to the server, too
        else:
            self.process.send_signal(sign)
        status = self.process.wait(300)
        took = time.monotonic() - began
        assert took < STOP_LIMIT_S, self.screen
        print(f"{sign.name}: {took:.1f} s")
        return status

    def group(self) -> list[psutil.Process]:
        """The processes of the run's group that live."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = os.getpgid(process.pid) == self.process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, ProcessLookupError):
                continue
        return found

    def sampled(self) -> list[Path]:
        return list((self.folder / "store" / "manifests" / "rollouts").rglob("*.json"))

    def flow_states(self) -> dict[str, str]:
        """The states of the flow runs in Prefect's database, by name."""
        with closing(sqlite3.connect(self.folder / "prefect" / "prefect.db")) as database:
            return dict(database.execute("SELECT name, state_type FROM flow_run").fetchall())

    def mlflow_states(self) -> list[str]:
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as database:
            return [status for (status,) in database.execute("SELECT status FROM runs")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "status"),
    swept(
        [(signal.SIGINT, 130), (signal.SIGTERM, 143)], often=lambda sign, _: sign == signal.SIGTERM
    ),
)
def test_a_run_is_cancelled_and_goes_on_as_the_screen_says(
    sign: signal.Signals, status: int, tiny_model: Path, tmp_path: Path
):
    run = Started(tmp_path, tiny_model)
    with run.running(run.train_command(), until=run.sampled):
        assert run.stop(sign) == status
        assert not run.group()
    assert "Traceback" not in run.screen
    states = run.flow_states()
    assert states.pop("night") == "CANCELLED"
    *whole, stopped = states.values()
    assert set(whole) <= {"COMPLETED"}
    assert stopped in ("CANCELLED", "COMPLETED")  # the signal may fall between two epochs
    assert run.mlflow_states() == ["KILLED"]

    (ended,) = (tmp_path / "store").glob("runs/night/starts/*-end.json")
    assert json.loads(ended.read_text())["outcome"] == "stopped"
    told = run.screen.partition("Resume with: ")[2].splitlines()[0]
    ddpo, *words = shlex.split(told)
    assert Path(ddpo).name == "ddpo"
    resumed = run.start([sys.executable, *COMMAND, *words])
    assert resumed.wait(START_LIMIT_S) == 0, run.screen
    assert run.mlflow_states() == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "setting", "sign", "cancelled"),
    swept(
        [
            (SLOW_REWARD, "reward.name=mine:score", signal.SIGTERM, {"night", "night epoch 0"}),
            (DEAF_PROMPTS, "prompts.name=mine:animals", signal.SIGINT, {"night"}),
        ],
        often=lambda source, *_: source == SLOW_REWARD,
    ),
    ids=["a reward in its thread", "the main thread"],
)
def test_what_does_not_end_is_left(
    source: str,
    setting: str,
    sign: signal.Signals,
    cancelled: set[str],
    tiny_model: Path,
    tmp_path: Path,
):
    (tmp_path / "mine.py").write_text(source)
    run = Started(tmp_path, tiny_model, setting)
    with run.running(run.train_command(), until=(tmp_path / "stuck").exists):
        assert run.stop(sign) == 128 + sign
        assert not run.group()
    assert run.screen.count("ddpo resume night") == 1
    assert "Traceback" not in run.screen
    assert run.flow_states() == dict.fromkeys(cancelled, "CANCELLED")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "status"),
    swept(
        [(signal.SIGINT, 130), (signal.SIGTERM, 143)], often=lambda sign, _: sign == signal.SIGINT
    ),
)
def test_a_stop_during_the_checks_says_that_nothing_has_begun(
    sign: signal.Signals, status: int, tiny_model: Path, tmp_path: Path
):
    (tmp_path / "mine.py").write_text(SLOW_CHECK)
    run = Started(tmp_path, tiny_model, "prompts.name=mine:animals")
    with run.running(run.train_command(), until=(tmp_path / "checking").exists):
        assert run.stop(sign) == status
        assert not run.group()
    assert "stopped before it began; nothing was written" in run.screen
    assert "Traceback" not in run.screen
    assert not list((tmp_path / "store").rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "told"),
    swept(
        [
            ("not begun", "stopped. No run has begun: there is nothing to resume"),
            ("begun", r"stopped. Committed work is kept. Resume with: \S*ddpo resume night"),
        ],
        often=lambda begun, _: begun == "not begun",
    ),
)
def test_a_stop_says_whether_there_is_a_run_to_resume(
    begun: str, told: str, tiny_model: Path, tmp_path: Path
):
    run = Started(tmp_path, tiny_model)
    command = [sys.executable, "-c", STOPPED, begun, *run.settings]
    done = subprocess.run(command, env=run.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert re.search(told, done.stdout)


@pytest.mark.slow
@pytest.mark.faults
def test_a_flow_without_the_command_is_cancelled_too(tiny_model: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(SLOW_REWARD)
    run = Started(tmp_path, tiny_model, "reward.name=mine:score")
    code = (
        "from ddpo_workflow.flows.train import train\n"
        f"train('configs/starter.yaml', 'night', overrides={run.settings!r})"
    )
    with run.running([sys.executable, "-c", code], until=(tmp_path / "stuck").exists):
        assert run.stop(signal.SIGTERM) == -signal.SIGTERM
    assert run.flow_states() == dict.fromkeys(("night", "night epoch 0"), "CANCELLED")
    assert run.mlflow_states() == ["KILLED"]
    with closing(sqlite3.connect(tmp_path / "prefect" / "prefect.db")) as database:
        logged = [message for (message,) in database.execute("SELECT message FROM log")]
    assert any("ddpo resume night --root" in message for message in logged)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "state"),
    [(KeyboardInterrupt, "CANCELLED"), (SystemExit, "CRASHED"), (MemoryError, "FAILED")],
)
def test_only_a_stop_cancels(error: type[BaseException], state: str):
    ended: list[FlowRun] = []

    def note(flow: object, flow_run: FlowRun, state: State) -> None:
        ended.append(flow_run)

    @flow(on_crashed=[mark_cancelled, note], on_failure=[mark_cancelled, note])
    def ends() -> None:
        raise error

    with pytest.raises(error):
        ends()
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(ended[0].id).state
    assert found is not None and found.type == state


def test_a_stop_is_seen_behind_the_error_that_it_led_to():
    def lead_to(first: BaseException) -> BaseException:
        try:
            try:
                raise first
            finally:
                raise ValueError("cleaning up failed")
        except ValueError as error:
            return error

    assert is_stop(lead_to(KeyboardInterrupt()))
    assert not is_stop(lead_to(MemoryError()))
    assert not is_stop(None)
