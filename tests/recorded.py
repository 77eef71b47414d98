"""A small run that is really in a store: epochs by the tasks' own bodies, on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpo.config import RunConfig
from ddpo.prompts import Prompt
from ddpo.rewards import Scores, load_reward
from ddpo.runs import Run, Scorer, check_run, start_run
from ddpo.store import manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from ddpo_workflow.tasks.score import scores_of
from tests.fold import as_in_a_new_process, run_epochs
from tests.tiny import tiny_config

EPOCHS = 2
SHARDS = 2
SAMPLES = 4
"""An epoch's, in two shards."""


def record_run(model: Path, root: Path | str, run_id: str = "mine", **changes: Any) -> Run:
    """Run two epochs of four samples each."""
    as_in_a_new_process()
    small = {"samples_per_epoch": SAMPLES, "shard_size": SAMPLES // SHARDS}
    batches = {"sample_batch_size": 2, "micro_batch_size": 2}
    changes = {
        "storage": {"root": str(root)},
        "sampler": {"steps": 2},
        "rollouts": small,
        "numerics": batches,
        **changes,
    }
    run = start_run(tiny_config(model, **changes), run_id)
    run_epochs(run, EPOCHS)
    return run


def start_unchecked(config: RunConfig, run_id: str) -> Run:
    """Start a fork without a look at its parent, as if that had changed since."""
    plan = check_run(config, run_id, awaits_parent=True)
    return replace(plan, awaits_parent=False).start()


def score_again(run: Run, reward: str, epochs: range = range(EPOCHS), **parameters: Any) -> str:
    """Score a run's samples with another reward; returns its id."""
    asked = run.config.reward.model_copy(update={"name": reward, "parameters": parameters})
    scorer = Scorer(asked, load_reward(reward, parameters))
    for epoch in epochs:
        for shard in range(SHARDS):
            key = ROLLOUTS.key(Partition(run.run_id, epoch, shard))
            rollouts = manifests.find(run.store, key)
            assert rollouts is not None
            scores_of(run, scorer, rollouts.ref, epoch, shard)
    return scorer.reward_id


def folder_of(run: Run) -> Path:
    """Return the folder of a store on this disk."""
    return Path(run.store.root.removeprefix("file://"))


def first_fails(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
    """Reward = 1, but the first of what is scored together has none."""
    failed = np.arange(len(images)) == 0
    return Scores(np.ones(len(images)), failed)


def describes_the_image(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
    """Reward = 1, with a column that is called as the picture is."""
    return Scores(np.ones(len(images)), columns={"image": ["a picture"] * len(images)})
