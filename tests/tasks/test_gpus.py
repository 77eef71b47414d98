"""Runs that share a GPU unasked are refused; names stand in for GPUs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddpo.config import LocalEngine, ProcessesEngine, RayEngine
from ddpo.errors import GpuInUse
from ddpo.store import keys
from ddpo.store.objects import Store
from ddpo_workflow.flows.run_requests import TrainRequest
from ddpo_workflow.flows.train import start_and_train
from ddpo_workflow.tasks.engines import check_gpus, gpus, held_gpus
from tests.tiny import tiny_config

HOLDER = """
import sys
from ddpo.config import LocalEngine
from ddpo_workflow.tasks.engines import gpus

gpus.gpus_of = lambda config, device: sys.argv[1:]
with gpus.held_gpus(LocalEngine(), "cuda", "night"):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are locked."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPUs that this process's runs compute on."""
    names = ["GPU-1"]
    monkeypatch.setattr(gpus, "gpus_of", lambda config, device: names)
    return names


@contextmanager
def another_run_on(*names: str) -> Iterator[subprocess.Popen[str]]:
    """Let a process hold GPUs until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_gpu_that_another_process_trains_on_is_refused_by_name(seen: list[str]) -> None:
    with another_run_on("GPU-0", "GPU-1") as other:
        message = rf"GPU-1 is in use by run night, process {other.pid}.*share_gpu: true"
        with pytest.raises(GpuInUse, match=message):
            check_gpus(LocalEngine(), "cuda")
        with pytest.raises(GpuInUse), held_gpus(LocalEngine(), "cuda", "mine"):
            pytest.fail("it is in use")
        seen[:] = ["GPU-2"]
        check_gpus(LocalEngine(), "cuda")


@pytest.mark.slow
def test_a_run_may_share_if_it_asks_to_and_then_counts_itself(
    seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = ProcessesEngine(type="processes", share_gpu=True)
    with another_run_on("GPU-1") as first, held_gpus(asks, "cuda", "second"):
        first.kill()
        first.wait()
        check_gpus(LocalEngine(), "cuda")  # runs of one process take turns
        monkeypatch.setattr(gpus, "_own", set())  # as another process sees it
        with pytest.raises(GpuInUse, match="run second"):
            check_gpus(LocalEngine(), "cuda")
        check_gpus(asks, "cuda")


@pytest.mark.slow
def test_a_killed_run_holds_nothing(seen: list[str], folder: Path) -> None:
    with another_run_on("GPU-1") as other:
        other.kill()
        other.wait()
        check_gpus(LocalEngine(), "cuda")
    assert not list(folder.glob("*/GPU-*"))


def test_nothing_is_refused_on_a_cpu_or_by_ray() -> None:
    assert gpus.gpus_of(LocalEngine(), "cpu") == []
    assert gpus.gpus_of(RayEngine(type="ray"), "cuda") == []


@pytest.mark.slow
def test_training_is_refused_before_anything_is_written(
    seen: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        tiny_model,
        storage={"root": str(tmp_path / "store")},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        outputs=str(tmp_path / "outputs"),
        epochs=1,
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.model_dump_json())
    request = TrainRequest(config_file=str(file), run_id="mine")
    plan = request.resolve()
    store = Store.open(str(tmp_path / "store"))
    with another_run_on("GPU-1"):
        with pytest.raises(GpuInUse):
            request.resolve()
        with pytest.raises(GpuInUse):
            start_and_train(plan)
        assert not store.list("runs/mine/starts") and not store.exists(keys.lease_key("mine"))
