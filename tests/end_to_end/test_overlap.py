"""A shard is scored while the next one is drawn."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ddpo_workflow.tasks.sample
from ddpo_workflow.flows.train import train
from ddpo_workflow.tasks.tracking.tracker import RunTracker, tracker
from tests.tiny import tiny_config

SHARDS = 10
SHARD_S = 0.8


def sleeping(images: Sequence[Image.Image], prompts: Sequence[Any]) -> list[float]:
    """A reward that takes its time, and no processor's."""
    time.sleep(SHARD_S)
    return [float(index) for index in range(len(images))]


@pytest.mark.slow
def test_a_reward_as_slow_as_sampling_adds_a_fifth_at_most(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = ddpo_workflow.tasks.sample.sample

    def drawn_slowly(*arguments: Any, **named: Any) -> Any:
        began = time.monotonic()
        drawn = draw(*arguments, **named)
        time.sleep(max(0.0, SHARD_S - (time.monotonic() - began)))
        return drawn

    monkeypatch.setattr(ddpo_workflow.tasks.sample, "sample", drawn_slowly)
    logged: dict[str, float] = {}
    log = RunTracker.log_metrics

    def overheard(self: RunTracker, metrics: dict[str, float], step: int) -> None:
        logged.update(metrics)
        log(self, metrics, step=step)

    monkeypatch.setattr(RunTracker, "log_metrics", overheard)
    tracker.cache_clear()
    database = shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    config = tiny_config(
        tiny_model,
        sampler={"steps": 2},
        rollouts={"samples_per_epoch": 2 * SHARDS, "shard_size": 2},
        numerics={"sample_batch_size": 2, "micro_batch_size": 2},
        reward={"name": f"{__name__}:sleeping"},
        storage={"root": str(tmp_path / "store")},
        tracking={"uri": f"sqlite:///{database}", "pictures": {"prompts": ["a cat"]}},
        outputs=str(tmp_path / "outputs"),
        epochs=1,
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.model_dump_json())
    train(str(file), run_id="overlap")
    phase_s = logged["time/sample_s"] + logged["time/score_wait_s"]
    longer_s = max(logged["time/sample_s"], SHARDS * SHARD_S)
    assert phase_s <= 1.2 * longer_s
