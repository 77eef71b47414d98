"""A small version of docs/results.md: training raises the reward, shuffled advantages do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.evaluate import Evaluation, Gain, evaluate
from ddpo.config.files import read_config
from ddpo.runs import Run, start_run
from tests.fold import run_epochs

EPOCHS = 2
SEEDS = tuple(range(101, 113))
# The demo's config, and few prompts, so that two epochs teach each of them something.
SMALL = [
    "prompts={name: prompt_list, parameters: {prompts: [a cat, a fox, a turtle, a butterfly]}}",
    "numerics.threads=1",
]


def short_run(folder: Path, *settings: str) -> Run:
    """Train on the starter."""
    overrides = [*SMALL, f"storage.root={folder}", *settings]
    run = start_run(read_config("configs/starter_fast.yaml", overrides), "short")
    run_epochs(run, EPOCHS)
    return run


def drawn(run: Run, epoch: int) -> Evaluation:
    return evaluate(run, epoch, seeds=SEEDS)


@pytest.mark.slow
def test_training_raises_the_reward_and_shuffled_advantages_do_not(tmp_path: Path):
    run = short_run(tmp_path / "real")
    shuffled = short_run(tmp_path / "control", "algorithm.advantages.shuffle=true")
    base, trained = drawn(run, 0), drawn(run, EPOCHS)
    gain, control = Gain.of(trained, base), Gain.of(drawn(shuffled, EPOCHS), base)
    assert gain.standard_errors > 4
    assert control.mean < gain.mean / 2
    assert trained.diversity > base.diversity / 2
    assert base.recognised > 0.9
    assert trained.recognised >= 0.7 * base.recognised
