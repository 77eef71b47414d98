"""A run that continues on another machine, or in another dtype."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ddpo.runs import Run, check_run, open_run, start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, ROLLOUTS
from ddpo_workflow.flows.run_requests import ForkRequest, ResumeRequest
from tests.fold import as_in_a_new_process, run_epochs
from tests.recorded import record_run
from tests.tiny import tiny_config


def test_another_gpu_on_resume_is_told_like_other_versions(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tiny_model, storage={"root": str(tmp_path)})
    plan = check_run(config, "r")
    elsewhere = {"device_name": "NVIDIA A100", "versions": {"torch": "2.0"}}
    replace(plan, numerics=plan.numerics.model_copy(update=elsewhere)).start()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ddpo"):
        start_run(config, "r")
    (told,) = caplog.messages
    assert re.search(r"started with NVIDIA A100, now \w+; torch 2\.0, now", told)
    caplog.clear()
    start_run(config, "new")
    start_run(config, "new")
    assert not caplog.messages


def state_of(run: Run, epoch: int):
    return CHECKPOINT.require(run.store, Partition(run.run_id, epoch)).state()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_way_out_that_a_diverged_16_bit_run_is_told_works(
    tiny_model: Path, tmp_path: Path, dtype: str
) -> None:
    batches = {"sample_batch_size": 2, "micro_batch_size": 2}
    parent = record_run(
        tiny_model,
        tmp_path / "store",
        numerics={**batches, "dtype": dtype},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        outputs=str(tmp_path / "outputs"),
    )
    advice = parent.numerics.advice
    assert "ddpo fork" in advice and "float32" in advice
    way_out = tuple(re.findall(r"--set (\S+)", advice))
    asked = ForkRequest(
        run_id=parent.run_id,
        epoch=1,
        fork_id="wider",
        overrides=(*way_out, "numerics.dtype=float32", "optimizer.learning_rate=1e-5"),
        storage=parent.store.root,
    )
    fork = asked.plan().start()
    run_epochs(fork, 2)
    assert fork.numerics.dtype == "float32"
    first, theirs = state_of(fork, 1), state_of(parent, 1)
    assert first.weights.keys() == theirs.weights.keys()
    assert all(value.equal(theirs.weights[name]) for name, value in first.weights.items())
    assert (first.loss_scale, theirs.loss_scale is None) == (None, dtype == "bfloat16")
    drawn = ROLLOUTS.require(fork.store, Partition("wider", 1, 0))
    assert all("run_id=wider" in stored.key for stored in drawn.objects.values())
    # Or with a lower learning rate alone, from the saved samples.
    lower = asked.model_copy(
        update={"fork_id": "lower", "overrides": ("optimizer.learning_rate=1e-5",)}
    )
    run_epochs(lower.plan().start(), 2)
    as_in_a_new_process()
    again = ResumeRequest(run_id="wider", storage=parent.store.root).plan().start()
    assert again.numerics == open_run(parent.store, "wider").numerics == fork.numerics
