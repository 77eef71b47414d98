"""A run whose checkpoints are in several files: killed between two, resumed, and all that follows.

Files are of two gigabytes at most; here they are of a few kilobytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ddpo.runs import open_run
from ddpo.store import checkpoints, keys, objects
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo.store.upkeep.sweep import sweep
from ddpo.store.upkeep.verify import verify_run
from tests.faults.crashes import RUN, Night
from tests.faults.processes import LIMIT_S, Command
from tests.faults.test_every_write import check_every_crash

FILE_BYTES = 10_000
PROGRAM = f"""
import os, signal, sys
from pathlib import Path
from ddpo.store import checkpoints
from ddpo.store.backends import LocalBackend

checkpoints.FILE_BYTES = {FILE_BYTES}
write_file = LocalBackend.write_file

def killed_once(self, path, file):
    if "epoch=00001/optimizer-00002-of" in path and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    write_file(self, path, file)

if os.environ.get("KILLED"):
    LocalBackend.write_file = killed_once
from ddpo_workflow.flows.cli.app import main
main()
"""


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", FILE_BYTES)


def parts(store: Store, epoch: int) -> Counter[str]:
    """Return how many files each role of a checkpoint has."""
    found = CHECKPOINT.require(store, Partition(RUN, epoch))
    return Counter(keys.whole_role(role) for role in found.objects)


def test_a_crash_at_some_writes_changes_no_byte(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path
) -> None:
    def night(name: str, root: str | None = None) -> Night:
        folder = tmp_path / name
        return Night.plan(tiny_model, root or str(folder / "store"), folder, mlflow_database)

    assert check_every_crash(night, lambda name: None, every=21) > 5
    assert parts(Store.open(str(tmp_path / "whole" / "store")), 2)["optimizer"] > 2


@pytest.mark.faults  # two minutes; `make test` has the crashes above
def test_a_run_killed_between_two_files_of_a_checkpoint_goes_on_and_can_be_used(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(name: str, **environment: str) -> Command:
        folder = tmp_path / name
        storage = {
            "root": str(folder / "store"),
            "keep_newest_checkpoints": 2,
            "retention": {"keep": "checkpoints", "older_than": 1},
        }
        outputs = str(folder / "outputs")
        night = Night.plan(
            tiny_model, storage["root"], folder, mlflow_database, storage=storage, outputs=outputs
        )
        return Command(night, folder, environment, ("-c", PROGRAM))

    whole, killed = plan("whole"), plan("killed", KILLED="yes")
    assert whole.run() == 0, whole.log.read_text()
    monkeypatch.chdir(killed.folder)
    assert killed.run() != 0
    store = killed.night.store
    assert not CHECKPOINT.exists(store, Partition(RUN, 1))
    written = store.list(f"checkpoints/run_id={RUN}/epoch=00001")
    assert any("/optimizer-00001-of-" in key for key in written)
    assert killed.run() == 0, killed.log.read_text()
    assert killed.night.content() == whole.night.content()
    assert parts(store, 2)["weights"] > 1 and parts(store, 2)["optimizer"] > 2

    # Retention has deleted all files of the first checkpoint, and nothing is damaged.
    assert verify_run(store, RUN).damages == ()
    left = [key for key in store.list(f"checkpoints/run_id={RUN}") if key.endswith(".safetensors")]
    assert left and not [key for key in left if "epoch=00000" in key]
    with monkeypatch.context() as later:
        later.setattr(objects, "now", lambda: datetime.now(UTC) + timedelta(days=2))
        swept = sweep(store, RUN)
    assert all("/.tmp-" in key for key in swept) and swept

    def ddpo(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words, "--root", store.root],
            env={**os.environ, "PREFECT_HOME": str(killed.folder / "prefect")},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ddpo("fork", RUN, "--run-id", "fork", "--epoch", "1", "--epochs", "2", "--reset-statistics")
    ours, theirs = (CHECKPOINT.require(store, Partition(run, 1)) for run in ("fork", RUN))
    assert ours.files("optimizer") == theirs.files("optimizer")
    ddpo("export-lora", RUN, "--out", str(tmp_path / "lora"))
    (file,) = (tmp_path / "lora").glob("pytorch_lora_weights.safetensors")
    state = CHECKPOINT.require(store, Partition(RUN, 2)).state()
    assert len(load_file(file)) == len(state.weights)
    assert open_run(store, "fork").fork is not None
    ddpo("delete", "fork", "--yes")
    ddpo("delete", RUN, "--yes")
    assert store.list(hidden=True) == []
