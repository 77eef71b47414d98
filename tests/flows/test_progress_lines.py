"""Where no terminal shows bars, a line an epoch says how a run is getting on."""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ddpo_workflow.flows.cli import screen
from ddpo_workflow.flows.cli.bars import bars_in_terminal
from ddpo_workflow.flows.logs import log_to_flow_runs
from ddpo_workflow.tasks import progress


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


@pytest.fixture(autouse=True)
def set_up() -> None:
    screen.set_up()
    log_to_flow_runs()


def compute(clock: Clock, seconds: float) -> None:
    """An epoch of three stages, each of which reports several times."""
    for name in ("pictures", "sample", "update"):
        for done in range(3):
            progress.report(name, done, 2)
        clock.now += seconds / 3


def lines(text: str) -> list[str]:
    """Return what a log shows, without the date and time that begin each line."""
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in text.splitlines()]


def test_an_epoch_is_a_line_with_reward_seconds_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bars_in_terminal(screen.console, "night", 40), progress.logged():
        progress.finished_epoch(1, 40, {"reward/mean": -2.0})
        compute(clock, 30)
        progress.finished_epoch(2, 40, {"reward/mean": -1.51234})
        compute(clock, 50)
        progress.finished_epoch(3, 40, {})
    assert lines(capsys.readouterr().out) == [
        "epoch 1 of 40: mean reward -2, already done",
        "sampling the fixed prompts ...",
        "sampling ...",
        "updating ...",
        "epoch 2 of 40: mean reward -1.512, 30 s, 19 min left",
        "epoch 3 of 40: no mean reward, 50 s, 25 min left",
    ]


def test_long_epochs_have_a_line_for_each_stage_too(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.logged():
        for done in (1, 2):
            compute(clock, 3600)
            progress.begin_stage("score")
            progress.finished_epoch(done, 2, {"reward/mean": 1.0})
        progress.begin_stage("export")
    shown = lines(capsys.readouterr().out)
    stages = ["sampling the fixed prompts ...", "sampling ...", "updating ...", "scoring ..."]
    assert shown == [
        *stages,
        "epoch 1 of 2: mean reward 1, 1 h 0 min, 1 h 0 min left",
        *stages,
        "epoch 2 of 2: mean reward 1, 1 h 0 min",
        "exporting the weights ...",
    ]


def test_a_terminal_shows_bars_and_no_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with bars_in_terminal(screen.console, "night", 2), progress.logged():
        compute(clock, 90)
        progress.finished_epoch(1, 2, {"reward/mean": 1.0})
    assert "epoch 1/2" in terminal.getvalue()
    assert "epoch 1 of 2" not in terminal.getvalue()


def test_a_terminal_that_cannot_redraw_shows_lines(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setitem(screen.console._environ, "TERM", "dumb")  # pyright: ignore
    with bars_in_terminal(screen.console, "night", 2), progress.logged():
        progress.finished_epoch(1, 2, {"reward/mean": 1.0})
    assert lines(terminal.getvalue()) == ["epoch 1 of 2: mean reward 1, already done"]


def test_nothing_is_logged_outside_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    progress.report("sample", 0, 1)
    progress.finished_epoch(1, 2, {"reward/mean": 1.0})
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_into_a_file_says_each_epoch_there_and_in_prefects_log(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = [
        f"model.path={tiny_model}",
        "rollouts={samples_per_epoch: 4, shard_size: 4}",
        "sampler={steps: 2}",
        "numerics={device: cpu, sample_batch_size: 4, micro_batch_size: 4, threads: 1}",
        "epochs=2",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        "tracking.system_metrics=false",
        f"outputs={tmp_path}/outputs",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    train = ["train", "configs/starter.yaml", "--root", str(tmp_path / "store"), *words]
    done = subprocess.run(
        [sys.executable, "-m", "ddpo_workflow.flows.cli", *train, "--run-id", "night"],
        env={**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = lines(done.stdout)
    for stage in ("sampling ...", "scoring ...", "updating ..."):
        assert shown.count(stage) == 1
    epochs = [line for line in shown if line.startswith("epoch ") and " of 2: mean" in line]
    assert len(epochs) == 2 and epochs[0].endswith(" left")
    (ended,) = (tmp_path / "store").glob("runs/night/starts/*-end.json")
    assert json.loads(ended.read_text())["outcome"] == "finished"
    with closing(sqlite3.connect(tmp_path / "prefect" / "prefect.db")) as database:
        logged = [message for (message,) in database.execute("SELECT message FROM log")]
    assert set(epochs) <= set(logged)
    assert "updating ..." in logged
