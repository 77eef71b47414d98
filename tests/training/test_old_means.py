"""Means of the policy that sampled: whose they are, where they are kept, and what epochs show."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpo.algorithms import DdpoIs
from ddpo.algorithms.policy_gradient import PairBatch
from ddpo.models import Policy
from ddpo.training.loop import initial_state, update
from ddpo.training.old_means import OldMeans
from ddpo.training.pairs import Pairs, micro_batches
from ddpo.training.samples import Rollouts
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.tiny import (
    alternating_advantages,
    as_credit,
    draw,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)

CREDIT = as_credit(alternating_advantages(8))
OPTIONS = ({"ratio": "guard"}, {"clip": "kl_mask", "kl_limit": 1e-12})


def trained(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Policy, Rollouts, list[PairBatch], dict[str, Any]]:
    """Return an untouched policy, the samples, all that losses were computed of, and metrics."""
    config = tiny_config(
        folder,
        algorithm=options,
        optimizer={"learning_rate": 1e-3},
        numerics={"micro_batch_size": 3},
    )
    policy, other = load_policy(config), load_policy(config)
    for each in (policy, other):
        grow_adapter(each)
    rollouts = rollouts_of(draw(policy, config))
    seen: list[PairBatch] = []
    right = DdpoIs.losses

    def noting(self: DdpoIs, batch: PairBatch) -> torch.Tensor:
        seen.append(batch)
        return right(self, batch)

    monkeypatch.setattr(DdpoIs, "losses", noting)
    _, metrics = update(policy, initial_state(policy), rollouts, CREDIT, {}, config)
    return other, rollouts, seen, metrics


@pytest.mark.parametrize("options", OPTIONS, ids=["guard", "kl_mask"])
def test_old_means_and_log_probs_are_the_sampling_policys_in_every_update(
    tiny_model: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, rollouts, seen, metrics = trained(tiny_model, options, monkeypatch)
    config = tiny_config(tiny_model, algorithm=options)
    assert isinstance(config.algorithm, DdpoIs)
    gradient = TrajectoryGradient(policy, config.sampler, config.algorithm)
    batches = [*micro_batches(range(4), range(4), 3), *micro_batches(range(4, 8), range(4), 3)]
    divergences = []
    for batch, pairs in zip(seen, batches, strict=True):
        with torch.no_grad():
            step = gradient.transition(rollouts, pairs)
        assert batch.old_mean is not None
        assert torch.equal(batch.old_mean, step.mean)
        next_latents = rollouts.latents_at(pairs.samples, pairs.steps + 1)
        assert torch.equal(batch.old_log_probs, step.log_prob(next_latents))
        mean, old, std = (each.double() for each in (batch.current.mean, step.mean, step.std))
        kl = kl_divergence(Normal(mean.detach(), std), Normal(old, std)).mean(dim=(1, 2, 3))
        divergences += kl.tolist()
    first, second = divergences[:16], divergences[16:]
    assert max(first) == 0.0 and min(second) > 0.0
    assert metrics["kl_to_old"] == pytest.approx(sum(second) / 16 / 2, rel=1e-4)
    assert metrics["recomputed_log_probs"] and 0.0 < metrics["clip_fraction"] <= 0.5


def test_the_kl_mask_lets_the_epoch_stay_nearer(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dropped has no gradient, so the same samples move the weights otherwise."""
    moved = [
        trained(tiny_model, {"clip": "kl_mask", "kl_limit": limit}, monkeypatch)[-1]
        for limit in (1e-30, 1e3)
    ]
    assert moved[0]["clip_fraction"] > 0.1 and moved[1]["clip_fraction"] == 0.0
    assert moved[0]["grad_norm"] != moved[1]["grad_norm"]


def test_they_are_in_a_file_of_the_size_of_the_trained_steps(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    right = os.posix_fallocate

    def noting(descriptor: int, start: int, size: int) -> None:
        sizes.append(size)
        right(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", noting)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trained(tiny_model, {"clip": "kl_mask"}, monkeypatch)
    assert sizes == [8 * 4 * (4 * 8 * 8) * 4]  # samples, steps, latents, bytes of a float32
    assert not list(tmp_path.iterdir())


def test_pairs_of_other_ranks_are_missing_and_those_computed_twice_are_kept_once() -> None:
    mine = [*micro_batches([0, 2], [1, 3], 3)]
    means = OldMeans([*mine, mine[0]], torch.Size((3, 4)))
    for pairs in (*mine, mine[0]):
        values = (10.0 * pairs.samples + pairs.steps)[:, None, None]
        means.put(pairs, values.expand(-1, 2, 2))
    asked = Pairs(torch.tensor([2, 0, 2]), torch.tensor([3, 1, 1]))
    assert means.of(asked)[:, 0, 0].tolist() == [23.0, 1.0, 21.0]
    with pytest.raises(IndexError, match="of sample 1 were not computed"):
        means.of(Pairs(torch.tensor([0, 1]), torch.tensor([1, 1])))
