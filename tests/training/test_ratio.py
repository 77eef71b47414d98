"""The importance ratio before any update, in full and in low precision."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpo.config import ForkConfig, RunConfig
from ddpo.diffusion.ddim import Transition
from ddpo.models import Policy
from ddpo.training.loop import initial_state, update
from ddpo.training.pairs import Pairs
from ddpo.training.ratios import RatioDeviation
from ddpo.training.samples import Rollouts
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.checks import (
    check_initial_ratio_is_one,
)
from tests.tiny import (
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    draw,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)

ADVANTAGES = alternating_advantages(8)


def use(policy: Policy, config: RunConfig) -> None:
    """Give a loaded policy another config's batch sizes."""
    policy.numerics = policy.numerics.model_copy(
        update={
            name: getattr(config.numerics, name)
            for name in ("sample_batch_size", "micro_batch_size")
        }
    )


# The importance ratio before any update


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_initial_ratio_is_exactly_1_where_the_update_sees_the_samplers_batches(
    tiny_model: Path, tiny_v_model: Path, kind: str, guidance: float
) -> None:
    folder = tiny_model if kind == "epsilon" else tiny_v_model
    config = tiny_config(folder, sampler={"guidance_scale": guidance})
    policy = load_policy(config)
    grow_adapter(policy)
    check_initial_ratio_is_one(policy, config)


@pytest.mark.parametrize("micro", [1, 3, 32])
def test_the_initial_ratio_is_1_within_rounding_otherwise(
    policy: Policy, config: RunConfig, rollouts: Rollouts, micro: int
) -> None:
    config = tiny_config(
        policy.folder, numerics={"micro_batch_size": micro}, algorithm={"updates_per_epoch": 1}
    )
    use(policy, config)
    _, metrics = update(policy, initial_state(policy), rollouts, as_credit(ADVANTAGES), {}, config)
    assert metrics["initial_ratio_deviation"]["max"] < 5e-6
    assert not metrics["recomputed_log_probs"]


def test_ratio_deviation_is_mean_percentile_and_maximum_of_the_ratios_distance_from_1() -> None:
    stored = torch.zeros(1, 102, dtype=torch.float64)
    shift = torch.linspace(0, 0.1, 101, dtype=torch.float64)
    new = torch.cat([shift * (-1) ** torch.arange(101), torch.tensor([torch.nan])])[None]
    distances = sorted(abs(math.exp(x) - 1) for x in new[0, :101].tolist())
    found = RatioDeviation.of(new, stored)
    assert found.mean == pytest.approx(sum(distances) / 101)
    assert found.p99 == pytest.approx(distances[99])
    assert found.max == pytest.approx(distances[100])


# Low precision, on the CPU: bfloat16 autocast


def bfloat16_run(
    folder: Path, old_log_probs: str, micro: int, learning_rate: float = 3e-4
) -> tuple[Policy, RunConfig, Rollouts]:
    config = tiny_config(
        folder,
        numerics={"dtype": "bfloat16", "micro_batch_size": micro},
        algorithm={"old_log_probs": old_log_probs},
        optimizer={"learning_rate": learning_rate, "weight_decay": 0.0},
    )
    policy = load_policy(config)
    grow_adapter(policy)
    return policy, config, rollouts_of(draw(policy, config))


def test_equal_batches_keep_the_ratio_at_1_even_in_bfloat16(tiny_model: Path) -> None:
    policy, config, rollouts = bfloat16_run(tiny_model, "auto", micro=4)
    _, metrics = update(policy, initial_state(policy), rollouts, as_credit(ADVANTAGES), {}, config)
    assert metrics["initial_ratio_deviation"]["max"] == 0.0
    assert not metrics["recomputed_log_probs"]


def other_order(rollouts: Rollouts) -> Rollouts:
    """Pair every sample with other neighbours, and perturb log-probs as another graph would."""
    noise = torch.randn(rollouts.log_probs.shape, generator=torch.Generator().manual_seed(1))
    return Rollouts(
        rollouts.prompts,
        rollouts.latents,
        rollouts.log_probs + 1e-3 * noise,
    )


# With a learning rate this small no weight changes in float32, so every update of the epoch sees
# the policy that sampled.
_STILL = 1e-30


@pytest.mark.parametrize("micro", [3, 8])
def test_recomputed_log_probs_make_the_ratio_1_in_every_updates_own_batches(
    tiny_model: Path, micro: int
) -> None:
    policy, config, rollouts = bfloat16_run(tiny_model, "recompute", micro, _STILL)
    state = initial_state(policy)
    after, metrics = update(policy, state, other_order(rollouts), as_credit(ADVANTAGES), {}, config)
    assert_same_tensors(after.weights, state.weights)
    assert metrics["recomputed_log_probs"]
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0
    assert metrics["clip_fraction"] == 0.0
    # What is measured is the stored log-probs' deviation all the same.
    assert metrics["initial_ratio_deviation"]["p99"] > 1e-4


@pytest.mark.parametrize("micro", [3, 8])
def test_log_probs_are_recomputed_in_the_very_batches_that_the_updates_see(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """A tiny model may round alike in all batches; Stable Diffusion does not."""
    policy, config, rollouts = bfloat16_run(tiny_model, "recompute", micro)
    seen: list[tuple[bool, list[int], list[int]]] = []
    right = TrajectoryGradient.transition

    def recorded(self: TrajectoryGradient, rollouts: Rollouts, pairs: Pairs) -> Transition:
        seen.append((torch.is_grad_enabled(), pairs.samples.tolist(), pairs.steps.tolist()))
        return right(self, rollouts, pairs)

    monkeypatch.setattr(TrajectoryGradient, "transition", recorded)
    update(policy, initial_state(policy), rollouts, as_credit(ADVANTAGES), {}, config)
    recomputed, trained = ([rest for g, *rest in seen if g == grad] for grad in (False, True))
    assert recomputed == trained and len(trained) == 2 * math.ceil(16 / micro)


def test_stored_log_probs_are_used_as_they_are(tiny_model: Path) -> None:
    policy, config, rollouts = bfloat16_run(tiny_model, "stored", 4, _STILL)
    _, metrics = update(
        policy, initial_state(policy), other_order(rollouts), as_credit(ADVANTAGES), {}, config
    )
    assert not metrics["recomputed_log_probs"]
    assert metrics["ratio_min"] < 1 - 5e-4 and metrics["ratio_max"] > 1 + 5e-4
    assert metrics["clip_fraction"] > 0.5


def test_auto_recomputes_where_low_precision_leaves_a_tenth_of_the_clip_range(
    tiny_model: Path,
) -> None:
    policy, config, rollouts = bfloat16_run(tiny_model, "auto", 4, _STILL)
    _, metrics = update(
        policy, initial_state(policy), other_order(rollouts), as_credit(ADVANTAGES), {}, config
    )
    assert metrics["recomputed_log_probs"] and metrics["clip_fraction"] == 0.0


@pytest.mark.slow
def test_an_adopted_epochs_log_probs_are_never_made_again_by_another_policy(
    tiny_model: Path,
) -> None:
    policy, config, rollouts = bfloat16_run(tiny_model, "auto", 4, _STILL)
    history = ForkConfig(run_id="other", epoch=0, rollouts=2, off_policy=True)
    config = config.model_copy(update={"fork": history})
    recomputed = []
    for epoch in range(3):
        state = replace(initial_state(policy), epoch=epoch)
        _, metrics = update(policy, state, other_order(rollouts), as_credit(ADVANTAGES), {}, config)
        recomputed.append(metrics["recomputed_log_probs"])
    # What the fork draws itself, after them, is checked as anything else.
    assert recomputed == [False, False, True]


@pytest.mark.slow
def test_log_probs_of_samples_drawn_ahead_are_never_made_again_by_another_policy(
    tiny_model: Path,
) -> None:
    policy, config, rollouts = bfloat16_run(tiny_model, "auto", 4, _STILL)
    ahead = config.rollouts.model_copy(update={"sample_ahead": True})
    config = config.model_copy(update={"rollouts": ahead})
    state = initial_state(policy)
    _, metrics = update(policy, state, other_order(rollouts), as_credit(ADVANTAGES), {}, config)
    assert not metrics["recomputed_log_probs"]
    assert metrics["ratio_min"] < 1 - 5e-4 and metrics["ratio_max"] > 1 + 5e-4


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_auto_measures_float32_on_a_gpu(
    policy: Policy, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 moves log-probs by about as much as they are perturbed here."""
    monkeypatch.setattr(type(policy), "device", torch.device("cpu"))  # what computes all the same
    policy.numerics = policy.numerics.model_copy(update={"device": "cuda"})
    config = tiny_config(policy.folder, optimizer={"learning_rate": _STILL, "weight_decay": 0.0})
    _, metrics = update(
        policy, initial_state(policy), other_order(rollouts), as_credit(ADVANTAGES), {}, config
    )
    assert metrics["initial_ratio_deviation"]["p99"] > 1e-4
    assert metrics["recomputed_log_probs"] and metrics["clip_fraction"] == 0.0


def test_auto_trusts_float32(policy: Policy, config: RunConfig, rollouts: Rollouts) -> None:
    _, metrics = update(
        policy, initial_state(policy), other_order(rollouts), as_credit(ADVANTAGES), {}, config
    )
    assert not metrics["recomputed_log_probs"]


def test_the_deviation_is_told_apart_by_timestep(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    rollouts.log_probs[1, 2] += 1e-3  # sample 1 at step 2
    _, metrics = update(policy, initial_state(policy), rollouts, as_credit(ADVANTAGES), {}, config)
    by_timestep = metrics["initial_ratio_deviation_by_timestep"]
    assert {timestep: d["max"] > 0 for timestep, d in by_timestep.items()} == {
        "751": False,
        "501": False,
        "251": True,
        "1": False,
    }
    expected = 1 - math.exp(-1e-3)
    assert metrics["initial_ratio_deviation"]["max"] == pytest.approx(expected, rel=1e-3)
    # Over the first update's four samples and four timesteps.
    assert metrics["initial_ratio_deviation"]["mean"] == pytest.approx(expected / 16, rel=1e-3)
    assert metrics["initial_ratio_deviation_by_timestep"]["501"]["max"] == 0.0
