"""A run's tasks by each engine: the same bytes, also when workers are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddpo.config import ProcessesEngine, RayEngine
from ddpo.errors import ConfigError, MissingObject
from ddpo.runs import open_run
from ddpo.store import keys
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo_workflow.flows.evaluate import evaluate
from ddpo_workflow.flows.train import train
from ddpo_workflow.tasks.engines.base import Engine, WorkerLost
from ddpo_workflow.tasks.engines.processes import process_pool
from ddpo_workflow.tasks.engines.ray_actors import ray_pool
from ddpo_workflow.tasks.progress import shown_by
from tests.calls import die, die_once, fail, fail_badly, sleep_here, speak, where
from tests.sweeps import swept
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

RUN = "night"
POOLS = ("processes", "ray")
KILLED_FLOW = """
import time
from ddpo.config import ProcessesEngine
from ddpo_workflow.tasks.engines.processes import process_pool
from tests.calls import where

pool = process_pool(ProcessesEngine(type="processes", workers=1), "cpu", ())
print(pool.call(where)[0], flush=True)
time.sleep(600)
"""
ENGINES: dict[str, Any] = {
    "local": "local",
    "processes": {"type": "processes", "workers": 2},
    "ray": {"type": "ray", "workers": 2},
}


def train_by(
    engine: Any,
    model: Path,
    database: Path,
    folder: Path,
    *,
    epochs: int = 2,
    sizes: tuple[Any, Any] = (2, 2),
    **changes: Any,
) -> Store:
    """Train a run with epochs of four shards each; returns its store."""
    if not folder.exists():
        folder.mkdir()
        shutil.copy(database, folder / "mlflow.db")
    config = tiny_config(
        model,
        engine=engine,
        sampler={"steps": 2},
        rollouts={"samples_per_epoch": 8, "shard_size": 2},
        numerics={"sample_batch_size": sizes[0], "micro_batch_size": sizes[1]},
        optimizer={"learning_rate": 1e-2},
        storage={"root": str(folder / "store")},
        tracking={
            "uri": f"sqlite:///{folder}/mlflow.db",
            "pictures": {"prompts": ["a cat"], "seeds": [0]},
        },
        outputs=str(folder / "outputs"),
        epochs=epochs,
        **changes,
    )
    file = folder / "config.yaml"
    file.write_text(config.model_dump_json())
    train(str(file), run_id=RUN)
    return Store.open(str(folder / "store"))


def evaluated(store: Store) -> dict[str, bytes]:
    """Evaluate the run; returns all that is stored then."""
    evaluate(RUN, overrides=["evaluation.count=4"], storage=store.root)
    return content(store)


def content(store: Store) -> dict[str, bytes]:
    """All that is stored, by key; the records of starts differ by nature."""
    starts = keys.starts_prefix(RUN)
    return {key: store.read(key) for key in store.list() if not key.startswith(starts)}


@pytest.fixture(scope="module")
def local(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Store:
    folder = tmp_path_factory.mktemp("local") / "run"
    return train_by("local", tiny_model, mlflow_database, folder)


@pytest.fixture(scope="module")
def undisturbed(local: Store) -> dict[str, bytes]:
    """What one process leaves."""
    return content(local)


def workers() -> list[psutil.Process]:
    """The processes of workers that this process has started, and that have not ended."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile, or is a zombie
            if "spawn_main" in " ".join(child.cmdline()) or child.name().startswith("ray::_Actor"):
                found.append(child)
    return found


@contextmanager
def killing(when: Callable[[], bool]) -> Iterator[list[int]]:
    """Kill a worker as soon as something is so; yields its process id, once that has happened."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not killed:
            time.sleep(0.01)
            if when() and (found := workers()):
                os.kill(found[0].pid, signal.SIGKILL)
                killed.append(found[0].pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("name", swept(zip(POOLS), often=lambda name: name == "processes"))
def test_an_engine_changes_no_byte(
    name: str,
    tiny_model: Path,
    mlflow_database: Path,
    tmp_path: Path,
    local: Store,
    undisturbed: dict[str, bytes],
) -> None:
    store = train_by(ENGINES[name], tiny_model, mlflow_database, tmp_path / name)
    assert content(store) == undisturbed
    if name == "processes":
        assert evaluated(store) == evaluated(local) != undisturbed
    psutil.wait_procs(workers(), timeout=300)
    assert not workers()


@pytest.mark.faults
def test_a_run_resumes_on_another_engine(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    folder = tmp_path / "run"
    train_by(ENGINES["processes"], tiny_model, mlflow_database, folder, epochs=1)
    store = train_by("local", tiny_model, mlflow_database, folder)
    assert content(store) == undisturbed


@pytest.mark.parametrize("name", swept(zip(POOLS), often=lambda name: name == "ray"))
def test_a_worker_that_is_killed_changes_no_byte(
    name: str,
    tiny_model: Path,
    mlflow_database: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
) -> None:
    manifests = tmp_path / name / "store" / "manifests"

    def first_is_committed() -> bool:
        return any("rollouts" in str(path) for path in manifests.rglob("*.json"))

    with killing(first_is_committed) as killed:
        store = train_by(ENGINES[name], tiny_model, mlflow_database, tmp_path / name)
    assert killed
    assert content(store) == undisturbed


class Updates:
    """Knows whether an update is under way."""

    def __init__(self) -> None:
        self.runs = False

    def stage(self, name: str, done: float, total: float) -> None:
        if name == "update":
            self.runs = 0 < done < total

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None: ...


def test_a_rank_that_is_killed_in_an_update_changes_no_byte(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    updates = Updates()
    with shown_by(updates), killing(lambda: updates.runs) as killed:
        store = train_by(ENGINES["processes"], tiny_model, mlflow_database, tmp_path / "run")
    assert killed
    assert content(store) == undisturbed


class Display:
    """Remembers the progress of stages."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float, float]] = []

    def stage(self, name: str, done: float, total: float) -> None:
        self.stages.append((name, done, total))

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None: ...


@pytest.fixture(scope="module", params=swept(zip(POOLS), often=lambda name: name == "processes"))
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made: Engine
    if request.param == "processes":
        made = process_pool(ProcessesEngine(type="processes", workers=2), "cpu", ())
    else:
        made = ray_pool(RayEngine(type="ray", workers=2), "cpu", ())
    yield made
    made.close()


def test_a_call_whose_worker_dies_is_made_again(engine: Engine, tmp_path: Path) -> None:
    assert engine.call(die_once, str(tmp_path / "called")) == "alive"


@pytest.mark.faults
def test_a_call_that_kills_every_worker_ends(engine: Engine) -> None:
    with pytest.raises(WorkerLost, match=r"engine\.workers"):
        engine.call(die)
    assert engine.call(where)[0] != os.getpid()


def test_errors_come_back_with_the_place_where_they_were_raised(engine: Engine) -> None:
    with pytest.raises(MissingObject, match="a/key") as raised:
        engine.call(fail)
    assert raised.value.root == "a/root"
    assert "in fail" in "".join(raised.value.__notes__)
    with pytest.raises(Exception, match="OSError"):
        engine.call(fail_badly)


def test_log_and_progress_come_back(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    display = Display()
    with shown_by(display):
        engine.call(speak)
    assert "half of it" in caplog.messages
    assert display.stages == [("sample", 1, 2)]


def test_calls_run_side_by_side(engine: Engine) -> None:
    seen: list[int] = []
    both = threading.Barrier(2, timeout=600)

    def call() -> None:
        both.wait()
        seen.append(engine.call(sleep_here, 1.0))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 2


def test_each_process_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    pool = process_pool(ProcessesEngine(type="processes"), "cuda", ())
    try:
        seen = [worker.run(partial(where))[1] for worker in pool._workers]
    finally:
        pool.close()
    assert seen == ["3", "GPU-5"]
    with pytest.raises(ConfigError, match="shows 2 GPUs"):
        process_pool(ProcessesEngine(type="processes", workers=3), "cuda", ())


def test_workers_end_with_their_pool() -> None:
    pool = process_pool(ProcessesEngine(type="processes", workers=1), "cpu", ())
    pid, _ = pool.call(where)
    pool.close()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=300)
    assert not psutil.pid_exists(pid)
    with pytest.raises(WorkerLost):
        pool.call(where)


def test_workers_end_with_a_flow_that_is_killed() -> None:
    flow = subprocess.Popen([sys.executable, "-c", KILLED_FLOW], stdout=subprocess.PIPE, text=True)
    try:
        assert flow.stdout is not None
        pid = int(flow.stdout.readline())
        assert psutil.pid_exists(pid)
    finally:
        flow.kill()
        flow.wait()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=600)
    assert not psutil.pid_exists(pid)


def test_a_number_of_workers_that_is_missing_or_too_high_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.workers=2"):
        process_pool(ProcessesEngine(type="processes"), "cpu", ())
    with pytest.raises(ConfigError, match=r"engine.workers=2"):
        ray_pool(RayEngine(type="ray"), "cpu", ())
    with pytest.raises(ConfigError, match=r"the Ray cluster has \d+ CPUs"):
        ray_pool(RayEngine(type="ray", workers=10_000), "cpu", ())


@pytest.mark.parametrize(
    "engine", swept([("processes",), ("ray",)], often=lambda engine: engine == "processes")
)
def test_a_run_whose_batch_sizes_are_auto_ends_as_one_that_is_given_them(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path, engine: str
) -> None:
    auto = ("auto", "auto")
    store = train_by(ENGINES[engine], tiny_model, mlflow_database, tmp_path / "auto", sizes=auto)
    found = open_run(store, RUN).numerics
    sizes = (found.sample_batch_size, found.micro_batch_size)
    assert all(isinstance(size, int) for size in sizes)
    given = train_by("local", tiny_model, mlflow_database, tmp_path / "given", sizes=sizes)
    last = Partition(RUN, 2)
    digests = [CHECKPOINT.require(each, last).digests["policy_digest"] for each in (store, given)]
    assert digests[0] == digests[1]
