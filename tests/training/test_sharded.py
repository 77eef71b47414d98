"""Full fine-tuning by several ranks, which split the weights: bytes and gradient are one's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpo.config import ProcessesEngine
from ddpo_workflow.tasks.engines.base import ALONE
from ddpo_workflow.tasks.engines.pool import Pool
from ddpo_workflow.tasks.engines.processes import process_pool
from tests.calls import epochs_by_rank, fail_in_an_update, whole_gradient_by_rank
from tests.sweeps import swept
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    made = process_pool(ProcessesEngine(type="processes", workers=2), "cpu", ())
    yield made
    made.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Pool]:
    made = process_pool(ProcessesEngine(type="processes", workers=4), "cpu", ())
    yield made
    made.close()


ALGORITHMS: dict[str, dict[str, Any]] = {
    "ddpo_is": {"type": "ddpo_is", "updates_per_epoch": 2},
    "recomputed": {
        "type": "ddpo_is",
        "updates_per_epoch": 1,
        "old_log_probs": "recompute",
        "advantages": {"type": "value"},
    },
    "guard": {
        "type": "ddpo_is",
        "updates_per_epoch": 2,
        "ratio": "guard",
    },
    "rwr": {"type": "rwr", "inner_epochs": 1, "updates_per_epoch": 2},
    "nft": {
        "type": "nft",
        "updates_per_epoch": 2,
        "kl_weight": 0,
        "advantages": {"type": "batch"},
        "old_decay": {"per_step": 0.2, "most": 0.9},
    },
    "awm": {
        "type": "awm",
        "updates_per_epoch": 2,
        "kl_weight": 0,
        "times_per_sample": 1,
        "advantages": {"type": "batch"},
    },
}


def raw_of(model: Path, algorithm: dict[str, Any]) -> dict[str, Any]:
    """The config of a short epoch, whose updates have a number of micro-batches that is odd."""
    config = tiny_config(
        model,
        trainable={"type": "full"},
        sampler={"steps": 2},
        rollouts={"samples_per_epoch": 6, "shard_size": 6},
        numerics={
            "sample_batch_size": 2,
            "micro_batch_size": 2 if algorithm["type"] == "ddpo_is" else 1,
        },
        optimizer={"learning_rate": 1e-3, "ema_decay": 0.9, "max_grad_norm": 0.2},
    )
    return {**config.whole(), "algorithm": algorithm}


@pytest.mark.parametrize(
    "name", swept(zip(ALGORITHMS), often=lambda name: name in ("ddpo_is", "nft"))
)
def test_two_ranks_give_the_bytes_of_one(two: Pool, tiny_model: Path, name: str) -> None:
    raw = raw_of(tiny_model, ALGORITHMS[name])
    expected = epochs_by_rank(ALONE, raw)
    assert two.together(epochs_by_rank, raw) == expected
    assert expected["metrics"]["grad_norm"] > 0.2  # it was clipped


@pytest.mark.faults  # two do in `make test`
def test_four_ranks_give_the_bytes_of_one(four: Pool, tiny_model: Path) -> None:
    raw = raw_of(tiny_model, ALGORITHMS["ddpo_is"])
    assert four.together(epochs_by_rank, raw) == epochs_by_rank(ALONE, raw)


def test_ranks_split_the_weights_and_step_along_the_gradient_of_one(
    two: Pool, tiny_model: Path
) -> None:
    raw = raw_of(tiny_model, {"type": "ddpo_is", "updates_per_epoch": 1})
    expected = whole_gradient_by_rank(ALONE, raw)
    found = two.together(whole_gradient_by_rank, raw)
    assert np.abs(expected["gradient"]).max() > 1e-3
    np.testing.assert_allclose(found["gradient"], expected["gradient"], rtol=0, atol=1e-6)
    assert found["norm"] == pytest.approx(expected["norm"], abs=1e-6)
    assert found["kl"] == pytest.approx(expected["kl"], abs=1e-6)
    assert found["digests"] == [expected["left"]] * 2
    assert found["left"] == expected["left"]
    assert found["held"] < 0.6 * expected["held"]


def test_a_policy_has_its_weights_again_after_an_update_that_failed(
    two: Pool, tiny_model: Path
) -> None:
    before, after = two.together(fail_in_an_update, raw_of(tiny_model, ALGORITHMS["ddpo_is"]))
    assert after == before
