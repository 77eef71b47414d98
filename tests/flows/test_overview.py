"""Runs are looked at from any terminal that has the store: listed, shown, watched, compared."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddpo.analysis import listing
from ddpo.runs import Run, open_run, start_run
from ddpo.runs import state as run_states
from ddpo.store import keys, runs
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.cli import overview
from ddpo_workflow.flows.endings import recording_end
from tests.fold import run_epochs
from tests.listed import many_runs
from tests.recorded import folder_of, record_run, start_unchecked
from tests.tiny import tiny_config

KEYS = [
    *("run_id", "state", "reason", "epoch", "epochs", "model", "prompts", "reward", "algorithm"),
    *("learning_rate", "seed", "first_reward", "last_reward", "started", "parent", "forked_at"),
    "error",
]
SIZES: dict[str, Any] = {
    "sampler": {"steps": 2},
    "rollouts": {"samples_per_epoch": 4, "shard_size": 2},
    "numerics": {"sample_batch_size": 2, "micro_batch_size": 2},
}


@dataclass
class Screen:
    """Runs the command in this process."""

    root: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    status: int = field(default=0, init=False)

    def __call__(self, *words: object, status: int = 0) -> str:
        """Return what a command shows."""
        self.monkeypatch.setattr(sys, "argv", ["ddpo", *map(str, words), "--root", str(self.root)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = self.capsys.readouterr().out
        assert int(ended.value.code or 0) == status, shown
        return shown


@pytest.fixture(scope="module")
def written(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `mine`, of two epochs, and its fork `other` with another learning rate."""
    run = record_run(tiny_model, tmp_path_factory.mktemp("looked-at") / "store", epochs=2)
    changes = {
        "storage": {"root": run.store.root},
        "fork": {"run_id": "mine", "epoch": 1},
        "optimizer": {"learning_rate": 0.5},
        "seed": 7,
    }
    runs.record_fork(run.store, "mine", "other", 1)
    start_unchecked(tiny_config(tiny_model, **SIZES, **changes, epochs=3), "other")
    return folder_of(run)


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "store"))


@pytest.fixture
def store(root: Path) -> Store:
    return Store.open(str(root))


@pytest.fixture
def ddpo(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Screen]:
    monkeypatch.setenv("COLUMNS", "200")
    yield Screen(root, monkeypatch, capsys)


def end(run: Run, outcome: Any, reason: str = "") -> None:
    runs.record_end(run.store, run.run_id, run.start or 0, outcome, reason)


# The list


def test_the_list_is_one_json_array_with_the_same_keys_for_every_run(
    ddpo: Screen, store: Store
) -> None:
    store.put_if_absent(keys.run_key("broken"), b"{")
    broken, mine, other = json.loads(ddpo("runs", "--json"))
    assert list(mine) == list(other) == list(broken) == KEYS
    assert broken["run_id"] == "broken" and "cannot" in broken["error"]
    assert (mine["state"], mine["epoch"], mine["epochs"]) == ("finished", 2, 2)
    assert (other["state"], other["epoch"], other["epochs"]) == ("running", 1, 3)
    assert (other["parent"], other["forked_at"], other["learning_rate"]) == ("mine", 1, 0.5)
    assert mine["first_reward"] < 0 and other["last_reward"] is None
    assert mine["started"] <= other["started"] and mine["error"] is None


def test_an_empty_store_is_an_empty_array(ddpo: Screen, tmp_path: Path) -> None:
    ddpo.root = tmp_path / "nothing"
    assert json.loads(ddpo("runs", "--json")) == []
    assert "no runs in" in ddpo("runs")


@pytest.mark.parametrize(
    ("order", "first"),
    [
        ("name", ["a-broken", "mine", "other"]),
        ("started", ["other", "mine", "a-broken"]),
        ("reward", ["mine", "other", "a-broken"]),
        ("epoch", ["mine", "other", "a-broken"]),
    ],
)
def test_the_list_can_be_sorted(ddpo: Screen, store: Store, order: str, first: list[str]) -> None:
    store.put_if_absent(keys.run_key("a-broken"), b"{")
    listed = json.loads(ddpo("runs", "--json", "--sort", order))
    assert [run["run_id"] for run in listed] == first
    rows = [row for row in ddpo("runs", "--sort", order).splitlines() if row.startswith("│")]
    assert [row.split()[1] for row in rows] == first


def test_a_wide_list_has_more_columns(ddpo: Screen) -> None:
    assert "learning rate" not in ddpo("runs")
    wide = ddpo("runs", "--wide")
    assert "learning rate" in wide and "mine at 1" in wide and "0.5" in wide


@pytest.mark.parametrize("epochs", [2, 7])
def test_a_list_reads_a_few_objects_a_run_however_many_epochs_it_has(
    store: Store, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = many_runs(open_run(store, "mine"), runs=5, epochs=epochs)
    calls: list[str] = []
    call = Store._call

    def counted(self: Store, name: str, key: str, *rest: Any, **named: Any) -> Any:
        calls.append(f"{name} {key}")
        return call(self, name, key, *rest, **named)

    monkeypatch.setattr(Store, "_call", counted)
    found = listing.list_runs(store)
    assert {run.run_id for run in found} == {"mine", "other", *names}
    assert sum(name.startswith("list ") for name in calls) == 2
    of_one = [name for name in calls if f"run_id={names[0]}/" in name or f"/{names[0]}/" in name]
    # The record and the start; of the first and the last epoch, a manifest and a table.
    reads = [name for name in of_one if name.startswith("read ")]
    assert len(reads) <= 6 and len(of_one) <= 8, of_one


# One run


def test_a_run_is_shown_with_what_matters(ddpo: Screen, root: Path) -> None:
    shown = ddpo("show", "mine")
    lines = shown.splitlines()
    assert lines[:3] == ["mine", "finished", "its forks: other"]
    assert re.search(r"│ learning_rate +│ 0\.\d+", shown)
    assert re.search(r"│ 0 +│ -[\d.]+ +│ [\d.]+ +│ #+", shown)
    assert f"ddpo resume mine --root {root}" in shown
    assert "ddpo ui" in shown and f"file://{root}" in shown
    assert "forked from mine at epoch 1" in ddpo("show", "other")


def test_a_run_is_shown_in_json(ddpo: Screen, root: Path) -> None:
    shown = json.loads(ddpo("show", "mine", "--json"))
    assert (shown["state"], shown["epoch"], shown["forks"]) == ("finished", 2, ["other"])
    assert [point["epoch"] for point in shown["curve"]] == [0, 1]
    assert shown["curve"][0]["samples"] == 4
    assert shown["identity"]["reward"]["name"] == "jpeg_compressibility"
    assert shown["commands"]["resume"] == f"ddpo resume mine --root {root}"
    assert list(shown) == list(json.loads(ddpo("show", "other", "--json")))
    listed = json.loads(ddpo("runs", "--json"))[0]
    means = [point["mean"] for point in shown["curve"]]
    assert [listed["first_reward"], listed["last_reward"]] == means


def test_a_long_curve_is_thinned_out(ddpo: Screen, store: Store) -> None:
    many_runs(open_run(store, "mine"), runs=1, epochs=100)
    shown = ddpo("show", "run-000")
    epochs = [int(number) for number in re.findall(r"^│ (\d+) +│ -", shown, re.MULTILINE)]
    assert len(epochs) == 20 and (epochs[0], epochs[-1]) == (0, 99)
    assert len(json.loads(ddpo("show", "run-000", "--json"))["curve"]) == 100


def test_an_unknown_run_is_refused_by_name(ddpo: Screen) -> None:
    for words in (("show", "mne"), ("watch", "mne"), ("diff", "mine", "mne")):
        assert "Did you mean mine" in ddpo(*words, status=2)


# What it is doing


def test_how_a_start_ended_is_recorded(store: Store) -> None:
    def told(run: Run, error: BaseException | None) -> str:
        try:
            with recording_end(run):
                if error:
                    raise error
        except BaseException as raised:
            assert raised is error
        return str(overview_of(run))

    run = open_run(store, "other")
    assert told(run, None) == "stopped at epoch 1 of 3"  # it has fewer epochs than it is to have
    for error, state in (
        (KeyboardInterrupt(), "stopped at epoch 1 of 3"),
        (ValueError("no\nroom at https://me:secret@host"), "failed at epoch 1 of 3: ValueError: "),
    ):
        run = start_run(run.config, "other")
        assert overview_of(run).word == "running"
        assert told(run, error).startswith(state)
    assert "secret" not in str(overview_of(run)) and "\n" not in str(overview_of(run))
    assert overview_of(start_run(run.config, "other")).word == "running"  # once it is resumed


def overview_of(run: Run) -> run_states.RunState:
    return run_states.run_state(run, runs.read_starts(run.store, run.run_id), run.first_epoch)


@pytest.mark.parametrize(
    ("host", "process", "word"),
    [("", "gone", "stopped"), ("", "reused", "stopped"), ("elsewhere", "gone", "running")],
)
def test_a_killed_process_is_missed_on_its_own_machine(
    store: Store, host: str, process: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(store, "other")
    monkeypatch.setattr(run_states.os, "getpid", lambda: -1)  # another command looks
    assert overview_of(run).word == "running"  # this process is still there
    if host:
        monkeypatch.setattr(run_states.socket, "gethostname", lambda: host)

    def look(self: psutil.Process) -> float:
        if process == "gone":
            raise psutil.NoSuchProcess(1)
        return 1e12

    monkeypatch.setattr(psutil.Process, "create_time", look)
    state = overview_of(run)
    assert state.word == word
    assert str(state).startswith(f"{word}")
    assert ("last sign of life" in str(state)) == (word == "running")


# Watching


def test_watch_says_each_epoch_until_the_run_is_complete(
    ddpo: Screen, store: Store, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {**SIZES, "storage": {"root": store.root}, "epochs": 3}
    run = start_run(tiny_config(tiny_model, **small), "night")
    looks: list[float] = []

    def passes(seconds: float) -> None:
        looks.append(seconds)
        run_epochs(run, len(looks))

    monkeypatch.setattr(overview.time, "sleep", passes)
    shown = ddpo("watch", "night").splitlines()
    assert shown[0].startswith("night: running, epoch 0 of 3, last sign of life ")
    epochs = [line for line in shown if line.startswith("epoch ")]
    assert [line.partition(":")[0] for line in epochs] == [f"epoch {n} of 3" for n in (1, 2, 3)]
    assert "mean reward -" in epochs[0]
    assert shown[-1] == "finished"
    assert looks == [5.0, 5.0, 5.0]


def test_watch_ends_with_a_run_that_failed(ddpo: Screen, store: Store) -> None:
    end(open_run(store, "other"), "failed", "OutOfMemory: no room")
    shown = ddpo("watch", "other", status=1)
    assert "failed at epoch 1 of 3: OutOfMemory: no room" in shown
    assert "resume: ddpo resume other --root" in shown


def test_watch_ends_with_ctrl_c(ddpo: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(overview.time, "sleep", stopped)
    assert ddpo("watch", "other", status=130).endswith("no longer watching; the run continues\n")


def test_watch_asks_a_store_every_five_seconds_at_most(ddpo: Screen) -> None:
    ddpo("watch", "mine", "--every", "1", status=2)


# Differences


def test_two_runs_are_compared_by_settings_and_curves(ddpo: Screen) -> None:
    shown = ddpo("diff", "mine", "other")
    assert re.search(r"│ identity +│ optimizer.learning_rate +│ 0\.\d+ +│ 0\.5 ", shown)
    assert re.search(r"│ operation +│ epochs +│ 2 +│ 3 ", shown)
    assert re.search(r"│ identity +│ fork +│ absent +│ {", shown)
    assert re.search(r"│ 0 +│ -[\d.]+ +│ +│ +│", shown)
    assert "no setting differs" in ddpo("diff", "mine", "mine")


def test_differences_in_json(ddpo: Screen) -> None:
    found = json.loads(ddpo("diff", "mine", "other", "--json"))
    assert list(found) == ["runs", "identity", "operation", "numerics", "code", "curves"]
    assert {"key": "seed", "values": ["0", "7"]} in found["identity"]
    assert {"key": "epochs", "values": ["2", "3"]} in found["operation"]
    assert [point["epoch"] for point in found["curves"]] == [0, 1]
    assert found["curves"][0]["means"][1] is None
