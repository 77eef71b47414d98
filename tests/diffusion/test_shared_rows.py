"""Samples that start alike are predicted once until they part, in sampling and in updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddpo.config import RunConfig
from ddpo.diffusion.sampling import Trajectories, sample
from ddpo.diffusion.shared_rows import SharedRows, shared_rows
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import Policy
from ddpo.training import trajectory_gradient
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from tests.checks import accumulated
from tests.tiny import (
    PROMPTS,
    alternating_advantages,
    as_credit,
    as_float64,
    counted,
    grow_adapter,
    load_policy,
    make_float64,
    tiny_config,
)

GROUP = 4
TEXTS = [text for text in PROMPTS[:2] for _ in range(GROUP)]
STARTS = [start for start in (11, 12) for _ in range(GROUP)]
WINDOWS: dict[str, dict[str, Any]] = {
    "all steps draw noise": {},
    "only the first draws noise": {"window": {"position": 0, "steps": 1, "noise_only_there": True}},
    "only the third draws noise": {"window": {"position": 2, "steps": 1, "noise_only_there": True}},
}


def configured(model: Path, **sampler: Any) -> RunConfig:
    rollouts = {"samples_per_prompt": GROUP, "shared_start": True}
    return tiny_config(
        model,
        sampler=sampler,
        rollouts=rollouts,
        algorithm={"type": "ddpo_is", "advantages": {"type": "group"}, "updates_per_epoch": 1},
    )


def drawn(policy: Policy, config: RunConfig) -> Trajectories:
    return sample(policy, TEXTS, range(8), sampler_of_epoch(policy, config, 0), starts=STARTS)


def grown(config: RunConfig) -> Policy:
    policy = load_policy(config)
    grow_adapter(policy)
    return policy


@pytest.mark.parametrize("name", WINDOWS)
def test_samples_are_those_of_a_prediction_each(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = configured(tiny_model, **WINDOWS[name])
    policy = grown(config)
    found = drawn(policy, config)
    monkeypatch.setattr("ddpo.diffusion.sampling.shared_starts", lambda *_: SharedRows([1] * 4))
    expected = drawn(policy, config)
    # Smaller batches round otherwise, and each step amplifies it.
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-5)
    ends = found.latents[:, -1].flatten(1)
    assert len(ends.unique(dim=0)) == 8


@pytest.mark.parametrize(
    ("name", "sampled", "trained"),
    [
        # Two groups; with guidance each prediction is two forwards.
        ("all steps draw noise", 2 * (2 + 3 * 8), 2 * (2 + 3 * 8)),
        ("only the first draws noise", 2 * (2 + 3 * 8), 2 * 2),
        ("only the third draws noise", 2 * (3 * 2 + 8), 2 * 2),
    ],
)
def test_they_are_predicted_once_and_counted_so(
    tiny_model: Path, name: str, sampled: int, trained: int
) -> None:
    config = configured(tiny_model, **WINDOWS[name])
    policy = grown(config)
    with counted(policy) as seen:
        samples = drawn(policy, config)
    assert sum(seen) == sampled
    rollouts = Rollouts(TEXTS, samples.latents, samples.log_probs)
    credit = as_credit(alternating_advantages(8))
    with counted(policy) as seen:
        _, metrics = update(policy, initial_state(policy), rollouts, credit, {}, config)
    assert sum(seen) == trained
    assert (metrics["sampling_forwards"], metrics["forwards"]) == (sampled, trained)
    # A forward of the sampler and one of the update hold the same rows.
    assert metrics["initial_ratio_deviation"]["max"] == 0.0


@pytest.mark.parametrize("micro", [3, 8])
@pytest.mark.parametrize("name", WINDOWS)
def test_the_gradient_is_that_of_a_prediction_each(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str, micro: int
) -> None:
    """Micro-batches of 3 cut groups apart."""
    config = configured(tiny_model, **WINDOWS[name])
    policy = grown(config)
    samples = drawn(policy, config)
    make_float64(policy)
    rollouts = as_float64(Rollouts(TEXTS, samples.latents, samples.log_probs))
    loss, gradient = accumulated(policy, config, rollouts, rollouts.log_probs, micro)
    monkeypatch.setattr(
        trajectory_gradient, "shared_rows", lambda prompts, *_: SharedRows([1] * len(prompts))
    )
    expected_loss, expected = accumulated(policy, config, rollouts, rollouts.log_probs, 8)
    assert expected.abs().max() > 1e-3
    assert loss == pytest.approx(expected_loss, abs=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("other", ["prompt", "step", "latents"])
def test_rows_that_differ_in_anything_are_predicted_by_themselves(other: str) -> None:
    texts = ["a", "a", "a"]
    steps, latents = torch.zeros(3, dtype=torch.int64), torch.ones(3, 2, 2, 2)
    assert shared_rows(texts, steps, latents).counts == [3]
    if other == "prompt":
        texts = ["a", "a", "b"]
    elif other == "step":
        steps[2] = 1
    else:
        latents[2, 1, 1, 1] += 1e-7
    assert shared_rows(texts, steps, latents).counts == [2, 1]


def test_samples_with_starts_of_their_own_are_predicted_by_themselves(tiny_model: Path) -> None:
    config = tiny_config(tiny_model)
    policy = grown(config)
    with counted(policy) as seen:
        sample(policy, TEXTS, range(8), config.sampler)
    assert sum(seen) == 8 * config.sampler.steps * 2
