"""Groups without spread, left out of updates: which samples remain, and that no other is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo.algorithms import DdpoIs
from ddpo.algorithms.advantages import GroupAdvantages
from ddpo.models import Policy
from ddpo.prompts import Prompt
from ddpo.runs import start_run
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT
from ddpo.training.loop import initial_state, update
from ddpo.training.parts import rows_read
from ddpo.training.ranks import Alone
from ddpo.training.samples import Rollouts
from tests.fold import as_in_a_new_process, run_epochs
from tests.tiny import assert_same_tensors, tiny_config

DROP = {"type": "group", "zero_spread": "drop"}
REWARDS = torch.tensor([1.0, 1.0, 2.0, 5.0, 3.0, 3.0, 4.0, 0.0])
SIGNS = torch.tensor([0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 1.0, -1.0])
CREDIT = {"reward": REWARDS, "advantage": SIGNS}
TRAINED = [2, 3, 6, 7]


def algorithm(updates: int = 2, **advantages: Any) -> DdpoIs:
    return DdpoIs(updates_per_epoch=updates, advantages=GroupAdvantages(**{**DROP, **advantages}))


def rows_of(algorithm: DdpoIs, advantages: torch.Tensor) -> list[list[int]]:
    credit = {"reward": REWARDS, "advantage": advantages}
    return [list(each.samples) for each in algorithm.updates(credit, run_seed=0, epoch=0)]


def test_updates_are_cut_from_samples_that_teach_something() -> None:
    assert rows_of(algorithm(), SIGNS) == [[2, 3], [6, 7]]
    assert rows_of(algorithm(3), SIGNS) == [[2], [3], [6, 7]]
    assert rows_of(algorithm(8), SIGNS) == [[2], [3], [6], [7]]
    assert rows_of(algorithm(zero_spread="keep"), SIGNS) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Nothing to learn: weights decay as they do without the option.
    assert rows_of(algorithm(), torch.zeros(8)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_both_groups_and_samples_are_counted() -> None:
    assert algorithm().credit_metrics(CREDIT, 2) == {"zero_spread_groups": 2, "trained_samples": 4}
    kept = algorithm(zero_spread="keep").credit_metrics(CREDIT, 2)
    assert kept == {"zero_spread_groups": 2}


def test_an_update_is_that_of_the_remaining_samples_alone(
    policy: Policy, rollouts: Rollouts
) -> None:
    """And what the epoch shows is theirs too: others' log-probs may be anything."""
    config = tiny_config(
        policy.folder,
        rollouts={"samples_per_prompt": 2},
        algorithm={"advantages": DROP, "kl_weight": 0.1},
        optimizer={"learning_rate": 1e-3},
    )
    broken = rollouts.log_probs.clone()
    broken[[0, 1, 4, 5]] += 7.0
    everything = Rollouts(rollouts.prompts, rollouts.latents, broken)
    state = initial_state(policy)
    after, metrics = update(policy, state, everything, CREDIT, {}, config)
    assert rows_read(policy, CREDIT, config, 0, Alone()) == set(TRAINED)
    policy.weights.load(state.weights)
    few = Rollouts(
        [rollouts.prompts[row] for row in TRAINED],
        rollouts.latents[TRAINED],
        rollouts.log_probs[TRAINED],
    )
    part = {name: values[TRAINED] for name, values in CREDIT.items()}
    alone, shown = update(policy, state, few, part, {}, config)
    assert_same_tensors(after.weights, alone.weights)
    names = metrics.keys() - {"zero_spread_groups"}
    assert {name: metrics[name] for name in names} == {name: shown[name] for name in names}
    assert metrics["trained_samples"] == 4 and metrics["ratio_max"] < 1.1


@pytest.mark.slow
def test_a_run_trains_on_groups_with_spread_alone(tiny_model: Path, tmp_path: Path) -> None:
    as_in_a_new_process()
    config = tiny_config(
        tiny_model,
        prompts={"name": "prompt_list", "parameters": {"prompts": ["a cat", "a dog"]}},
        reward={"name": f"{__name__}:brightness_of_cats"},
        algorithm={"advantages": DROP},
        rollouts={"samples_per_epoch": 16, "samples_per_prompt": 2},
        storage={"root": str(tmp_path)},
    )
    run = start_run(config, "r")
    metrics = CHECKPOINT.load(run.store, run_epochs(run, 1)).metrics
    (table,) = ADVANTAGES.find_all(run.store, "r", 0)
    rows = ADVANTAGES.load(run.store, table).rows()
    spreads = [{row.reward for row in rows[first : first + 2]} for first in range(0, 16, 2)]
    flat = sum(len(rewards) == 1 for rewards in spreads)
    assert 0 < flat < 8
    assert metrics["zero_spread_groups"] == flat and metrics["trained_samples"] == 2 * (8 - flat)


def brightness_of_cats(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    """Reward = the mean of all pixels; for other prompts, 1."""
    return [
        float(np.asarray(image, dtype=np.float64).mean()) if "cat" in prompt.text else 1.0
        for image, prompt in zip(images, prompts, strict=True)
    ]
