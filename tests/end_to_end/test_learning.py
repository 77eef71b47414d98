"""A small version of docs/results.md: training raises the reward, shuffled advantages do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.evaluate import Gain, evaluate
from ddpo.config_files import read_config
from ddpo.run import start_run
from tests.fold import run_epochs

EPOCHS = 4
SMALL = ["sampler.steps=10", "sampler.samples_per_epoch=64"]


def gain_of_a_short_run(folder: Path, *settings: str) -> tuple[Gain, float]:
    """Train on the starter; returns the paired gain and diversity, as a share of the base's."""
    overrides = [*SMALL, f"storage.root={folder}", *settings]
    run = start_run(read_config("configs/starter.yaml", overrides), "short")
    run_epochs(run, EPOCHS)
    base, trained = (evaluate(run, epoch, seeds=(101, 102)) for epoch in (0, EPOCHS))
    return Gain.of(trained, base), trained.diversity / base.diversity


@pytest.mark.slow
def test_training_raises_the_reward_and_shuffled_advantages_do_not(tmp_path: Path):
    real, diversity = gain_of_a_short_run(tmp_path / "real")
    control, _ = gain_of_a_short_run(tmp_path / "control", "advantages.shuffle=true")
    assert real.standard_errors > 4
    assert control.mean < real.mean / 2
    assert diversity > 0.5
