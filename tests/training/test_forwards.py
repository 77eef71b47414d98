"""Forwards of the network that an epoch takes: what is stated is what a hook on it counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ddpo.training.loop import initial_state, update
from tests.tiny import counted, draw, grow_adapter, load_policy, rollouts_of, tiny_config

BATCH = {"advantages": {"type": "batch"}}
ALGORITHMS: Mapping[str, dict[str, Any]] = {
    "ddpo_is": {"type": "ddpo_is", "updates_per_epoch": 2},
    "with the base": {"type": "ddpo_is", "updates_per_epoch": 2, "kl_weight": 0.1},
    "recomputed": {"type": "ddpo_is", "updates_per_epoch": 2, "old_log_probs": "recompute"},
    "guard": {"type": "ddpo_is", "updates_per_epoch": 2, "ratio": "guard", "kl_weight": 0.1},
    "ddpo_sf": {"type": "ddpo_sf", "updates_per_epoch": 1},
    "rwr": {"type": "rwr", "inner_epochs": 2, "updates_per_epoch": 4},
    "nft": {"type": "nft", "updates_per_epoch": 2, "kl_weight": 0.1, **BATCH},
    "awm": {"type": "awm", "updates_per_epoch": 2, **BATCH},
    "dpo": {"type": "dpo", "inner_epochs": 2, "updates_per_epoch": 2},
}
SAMPLERS = [{}, {"guidance_scale": 1.0}, {"window": {"position": 1, "steps": 2}}]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["guided", "unguided", "window"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_forwards_are_those_that_the_network_sees(
    tiny_model: Path, name: str, sampler: dict[str, Any]
) -> None:
    groups = {"samples_per_prompt": 2} if name == "dpo" else {}
    config = tiny_config(tiny_model, algorithm=ALGORITHMS[name], sampler=sampler, rollouts=groups)
    policy = load_policy(config)
    grow_adapter(policy)
    with counted(policy) as drawn:
        rollouts = rollouts_of(draw(policy, config))
    credit = config.algorithm.credit_of_all(len(rollouts.prompts))
    with counted(policy) as seen:
        _, metrics = update(policy, initial_state(policy, old=True), rollouts, credit, {}, config)
    assert metrics["sampling_forwards"] == sum(drawn)
    assert metrics["forwards"] == sum(seen)
