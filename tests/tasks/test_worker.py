"""What a worker process keeps between tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ddpo.runs import Run, start_run
from ddpo_workflow.tasks import worker
from tests.tiny import tiny_config


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Iterator[Run]:
    """A run of three threads."""
    before = torch.get_num_threads()
    config = tiny_config(
        tiny_model,
        storage={"root": str(tmp_path / "store")},
        numerics={"threads": 3},
    )
    yield start_run(config, "r")
    torch.set_num_threads(before)


def with_model(run: Run) -> int:
    with worker.fresh_policy(run):
        return torch.get_num_threads()


def without_model(run: Run) -> int:
    worker.opened(run.handle)
    return torch.get_num_threads()


@pytest.mark.parametrize("task", [with_model, without_model])
def test_a_task_computes_with_its_runs_number_of_threads_in_whatever_thread(
    task: Callable[[Run], int], run: Run
) -> None:
    """Torch counts for each thread apart, and another count rounds sums differently."""
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for thread in (first, second):
            thread.submit(torch.set_num_threads, 1).result()
            # From the first question on, a thread keeps its count whatever others set.
            assert thread.submit(torch.get_num_threads).result() == 1
        assert first.submit(task, run).result() == 3
        assert second.submit(torch.get_num_threads).result() == 1
        assert second.submit(task, run).result() == 3


def test_a_run_that_chooses_its_threads_does_not_choose_those_of_the_next(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    def started(run_id: str) -> Run:
        storage = {"root": str(tmp_path / "store")}
        config = tiny_config(tiny_model, storage=storage, numerics={"threads": "auto"})
        return start_run(config, run_id)

    own = started("before").numerics.threads
    assert with_model(run) == 3 != own
    assert started("after").numerics.threads == own
