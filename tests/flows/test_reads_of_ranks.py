"""Each rank of an update reads the shards of its micro-batches, and no other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpo.config import ProcessesEngine
from ddpo.runs import start_run
from ddpo.store.kinds import CHECKPOINT
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.engines.pool import Pool
from ddpo_workflow.tasks.engines.processes import process_pool
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.update import update_policy
from tests.calls import update_noting_reads
from tests.fold import as_in_a_new_process
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

SHARDS = 4
WHOLE: dict[str, Any] = {"trainable": {"type": "full"}}
RECOMPUTED: dict[str, Any] = {"algorithm": {"type": "ddpo_is", "old_log_probs": "recompute"}}
RWR: dict[str, Any] = {"algorithm": {"type": "rwr", "inner_epochs": 1, "updates_per_epoch": 2}}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    """Two and three processes."""
    made = {
        n: process_pool(ProcessesEngine(type="processes", workers=n), "cpu", ()) for n in (2, 3)
    }
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize(
    ("workers", "micro", "changes", "expected"),
    [
        # Micro-batches of a shard each: each rank reads its part.
        (2, 2, {}, [{0, 2}, {1, 3}]),
        (2, 2, WHOLE, [{0, 2}, {1, 3}]),
        pytest.param(2, 2, RECOMPUTED, [{0, 2}, {1, 3}], marks=pytest.mark.faults),
        # An update of two micro-batches a timestep: the fourth goes round to the first rank.
        (3, 2, {}, [{0, 1, 2, 3}, {1, 3}, {0, 2}]),
        # One micro-batch an update: two ranks compute nothing, or the first's once more.
        pytest.param(
            3, 8, {"sampler": {"steps": 1}}, [{0, 1, 2, 3}, {0}, {0}], marks=pytest.mark.faults
        ),
        pytest.param(
            3, 8, WHOLE | {"sampler": {"steps": 1}}, [{0, 1, 2, 3}] * 3, marks=pytest.mark.faults
        ),
        (2, 2, RWR, [{0, 1, 2, 3}] * 2),
    ],
)
def test_a_rank_reads_what_it_computes_and_the_bytes_are_those_of_one(
    pools: dict[int, Pool],
    tiny_model: Path,
    tmp_path: Path,
    workers: int,
    micro: int,
    changes: dict[str, Any],
    expected: list[set[int]],
) -> None:
    as_in_a_new_process()
    root = tmp_path / "store"
    config = tiny_config(
        tiny_model,
        **{
            "sampler": {"steps": 2},
            "rollouts": {"samples_per_epoch": 2 * SHARDS, "shard_size": 2},
            "numerics": {"sample_batch_size": 2, "micro_batch_size": micro},
            "storage": {"root": str(root)},
            **changes,
        },
    )
    run = start_run(config, "mine")
    first = start.fn(run.handle)
    rollouts = [sample_shard.fn(run.handle, first, 0, shard) for shard in range(SHARDS)]
    scores = [score_shard.fn(run.handle, ref, 0, shard) for shard, ref in enumerate(rollouts)]
    credit = credit_of.fn(run.handle, first, rollouts, scores, 0)
    shutil.copytree(root, tmp_path / "before")
    alone = CHECKPOINT.load(run.store, update_policy.fn(run.handle, first, rollouts, credit, 0))
    shutil.rmtree(root)
    (tmp_path / "before").rename(root)

    notes = str(tmp_path)
    done = pools[workers].together(update_noting_reads, notes, run.handle, first, rollouts, credit)
    assert CHECKPOINT.load(run.store, done).objects == alone.objects

    keys = [run.store.list("trajectories")[shard] for shard in range(SHARDS)]
    read = [(tmp_path / f"rank-{rank}").read_text().splitlines() for rank in range(workers)]
    assert [{keys.index(key) for key in each} for each in read] == expected
    assert all(len(each) == len(set(each)) for each in read)
