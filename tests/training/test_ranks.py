"""An update by several ranks, in processes of their own: the bytes of one, and how a rank fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpo.config import ProcessesEngine
from ddpo.errors import MissingObject
from ddpo.training.ranks import RanksDiffer
from ddpo_workflow.tasks.engines.base import ALONE, WorkerLost
from ddpo_workflow.tasks.engines.pool import Pool
from ddpo_workflow.tasks.engines.processes import process_pool
from tests.calls import epochs_by_rank, fail_on_rank_1
from tests.tiny import tiny_config
from tests.tiny_families import SETTINGS, build_tiny_sd3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.faults)])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = process_pool(ProcessesEngine(type="processes", workers=request.param), "cpu", ())
    yield made
    made.close()


ALGORITHMS: dict[str, dict[str, Any]] = {
    "ddpo_is": {"type": "ddpo_is", "updates_per_epoch": 2, "kl_weight": 0.1},
    "recomputed": {"type": "ddpo_is", "updates_per_epoch": 1, "old_log_probs": "recompute"},
    "guard": {"type": "ddpo_is", "updates_per_epoch": 2, "ratio": "guard", "kl_weight": 0.1},
    "rwr": {"type": "rwr", "inner_epochs": 2, "updates_per_epoch": 4},
    "nft": {"type": "nft", "updates_per_epoch": 2, "advantages": {"type": "batch"}},
    "awm": {"type": "awm", "updates_per_epoch": 2, "advantages": {"type": "batch"}},
    "dpo": {"type": "dpo", "inner_epochs": 2, "updates_per_epoch": 2},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_any_number_of_ranks_gives_the_bytes_of_one(
    pool: Pool, tiny_model: Path, name: str
) -> None:
    config = tiny_config(
        tiny_model,
        optimizer={"learning_rate": 1e-3},
        numerics={"micro_batch_size": 3},  # 6 micro-batches an update: not a multiple of 4
    )
    raw = {**config.whole(), "algorithm": ALGORITHMS[name]}
    if name == "dpo":  # three micro-batches of a pair each
        raw["rollouts"] = {**raw["rollouts"], "samples_per_prompt": 4}
        raw["numerics"] = {**raw["numerics"], "micro_batch_size": 2}
    assert pool.together(epochs_by_rank, raw) == epochs_by_rank(ALONE, raw)


@pytest.mark.faults  # minutes of compilers
def test_ranks_that_compile_give_the_bytes_of_one_that_does(pool: Pool, tmp_path: Path) -> None:
    settings = SETTINGS["sd3"]
    config = tiny_config(
        tmp_path,
        model={"path": str(build_tiny_sd3(tmp_path)), **settings["model"]},
        sampler=settings["sampler"],
        numerics={"compile": True},
        algorithm={"kl_weight": 0.1},
    )
    raw = config.whole()
    alone = epochs_by_rank(ALONE, raw)
    assert pool.together(epochs_by_rank, raw) == alone
    raw["numerics"] = {**raw["numerics"], "compile": False}
    assert epochs_by_rank(ALONE, raw) != alone


def test_ranks_whose_weights_differ_commit_nothing(pool: Pool, tiny_model: Path) -> None:
    with pytest.raises(RanksDiffer, match="different weights"):
        pool.together(epochs_by_rank, tiny_config(tiny_model).whole(), True)


def test_an_error_on_one_rank_ends_all_of_them(pool: Pool) -> None:
    with pytest.raises(MissingObject, match="a/key"):
        pool.together(fail_on_rank_1, "raises")


def test_a_rank_that_is_killed_is_named(pool: Pool) -> None:
    with pytest.raises(WorkerLost, match="worker process 1"):
        pool.together(fail_on_rank_1, "killed")
