from __future__ import annotations

import math
import uuid
from pathlib import Path

import pytest
import torch

from ddpo.config import RunConfig
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from ddpo.training.state import TrainState
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.checks import accumulated
from tests.states import commit_state
from tests.tiny import (
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    draw,
    flat,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)

ADVANTAGES = alternating_advantages(8)
FULL = {"type": "full"}


def use(policy: Policy, config: RunConfig) -> None:
    """Give a loaded policy another config's batch sizes."""
    policy.numerics = policy.numerics.model_copy(
        update={
            name: getattr(config.numerics, name)
            for name in ("sample_batch_size", "micro_batch_size")
        }
    )


# State


def epoch_of(
    policy: Policy, state: TrainState, config: RunConfig, epoch: int
) -> tuple[TrainState, Rollouts]:
    rollouts = rollouts_of(draw(policy, config, first_seed=1000 * (epoch + 1)))
    statistics = {"a cat": (float(epoch), 1.0)}
    return update(policy, state, rollouts, as_credit(ADVANTAGES), statistics, config)[0], rollouts


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [{"type": "lora"}, FULL])
def test_two_epochs_straight_are_one_and_one_more_from_the_store(
    tiny_model: Path, trainable: dict[str, str]
) -> None:
    config = tiny_config(tiny_model, trainable=trainable, optimizer={"learning_rate": 1e-3})
    policy = load_policy(config)
    first, _ = epoch_of(policy, initial_state(policy), config, 0)
    straight, _ = epoch_of(policy, first, config, 1)

    store = Store.open(f"memory://{uuid.uuid4().hex}")
    committed = commit_state(store, first)
    loaded = CHECKPOINT.load(store, committed).state()
    another = load_policy(config)
    another.weights.load(loaded.weights)
    resumed, _ = epoch_of(another, loaded, config, 1)

    assert_same_tensors(resumed.weights, straight.weights)
    assert_same_tensors(resumed.optimizer, straight.optimizer)
    assert resumed.statistics == straight.statistics == {"a cat": (1.0, 1.0)}
    assert (resumed.epoch, resumed.updates, resumed.samples) == (2, 4, 16)
    moments = {key.split("/")[0] for key in straight.optimizer}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}
    steps = {float(v) for key, v in straight.optimizer.items() if key.startswith("step/")}
    assert steps == {4.0}
    assert not torch.equal(flat(straight.weights), flat(first.weights))


@pytest.mark.slow
def test_updates_are_those_of_one_adamw_that_lives_on(policy: Policy, config: RunConfig) -> None:
    state = initial_state(policy)
    rounds = []
    for epoch in range(2):
        state, rollouts = epoch_of(policy, state, config, epoch)
        rounds.append(rollouts)

    plain = load_policy(config)
    grow_adapter(plain)
    parameters = list(plain.weights.parameters().values())
    adamw = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    gradient = TrajectoryGradient(plain, config.sampler, config.algorithm)
    for rollouts in rounds:
        for samples in (range(4), range(4, 8)):
            gradient.accumulate(rollouts, ADVANTAGES, samples, rollouts.log_probs)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adamw.step()
            adamw.zero_grad()
    assert_same_tensors(state.weights, plain.weights.state())
    assert not torch.equal(flat(state.weights), flat(load_policy(config).weights.state()))


def test_a_state_is_a_copy_that_later_updates_leave_alone(
    policy: Policy, config: RunConfig
) -> None:
    before = initial_state(policy)
    kept = {name: value.clone() for name, value in before.weights.items()}
    after, _ = epoch_of(policy, before, config, 0)
    assert_same_tensors(before.weights, kept)
    assert not torch.equal(flat(after.weights), flat(kept))


def test_lora_changes_the_adapter_alone(policy: Policy, config: RunConfig) -> None:
    before = {name: p.detach().clone() for name, p in policy.pipeline.unet.named_parameters()}
    epoch_of(policy, initial_state(policy), config, 0)
    after = dict(policy.pipeline.unet.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    adapter = {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert changed == adapter == set(policy.weights.parameters())
    # to_q, to_k, to_v, to_out.0 of self- and cross-attention, wherever the UNet attends.
    assert len(adapter) == 2 * 4 * 2 * len(
        [name for name in before if name.endswith("attn1.to_q.base_layer.weight")]
    )


def test_full_training_changes_the_whole_unet_and_nothing_else(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, trainable=FULL)
    policy = load_policy(config)

    def everything() -> dict[str, torch.Tensor]:
        return {
            f"{part}.{name}": value.detach().clone()
            for part in ("unet", "vae", "text_encoder")
            for name, value in getattr(policy.pipeline, part).named_parameters()
        }

    before = everything()
    epoch_of(policy, initial_state(policy), config, 0)
    after = everything()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("unet.")}


# The direction, and what is measured


@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_sf"])
def test_an_update_makes_what_was_good_more_likely(
    policy: Policy, rollouts: Rollouts, algorithm: str
) -> None:
    config = tiny_config(
        policy.folder,
        algorithm={"type": algorithm, "updates_per_epoch": 1},
        optimizer={"learning_rate": 1e-4},
    )
    for sign in (1.0, -1.0):
        advantages = torch.zeros(8)
        advantages[2] = sign
        grow_adapter(policy)  # back to the policy that sampled
        update(policy, initial_state(policy), rollouts, as_credit(advantages), {}, config)
        gradient = TrajectoryGradient(policy, config.sampler, config.algorithm)
        new = gradient.recompute(rollouts, range(8))
        moved = sign * (new[2] - rollouts.log_probs[2]).mean()
        assert moved > 1e-5


def test_metrics_are_their_plain_formulas(policy: Policy, tiny_model: Path) -> None:
    config = tiny_config(tiny_model, optimizer={"learning_rate": 2e-3})
    rollouts = rollouts_of(draw(policy, config))
    start = initial_state(policy)
    _, metrics = update(policy, start, rollouts, as_credit(ADVANTAGES), {}, config)

    # The first half's update by itself, and what it makes of the second half's log-probs.
    policy.weights.load(start.weights)
    half = Rollouts(rollouts.prompts[:4], rollouts.latents[:4], rollouts.log_probs[:4])
    once = tiny_config(
        tiny_model, optimizer={"learning_rate": 2e-3}, algorithm={"updates_per_epoch": 1}
    )
    _, first = update(policy, start, half, as_credit(ADVANTAGES[:4]), {}, once)
    gradient = TrajectoryGradient(policy, config.sampler, config.algorithm)
    new = gradient.recompute(rollouts, range(4, 8))[4:].double()
    old = rollouts.log_probs[4:].double()
    differences = [0.0] * 16 + (new - old).flatten().tolist()
    ratios = [math.exp(d) for d in differences]

    assert metrics["approx_kl"] == pytest.approx(sum(d * d for d in differences) / 2 / 32, rel=1e-9)
    clipped = sum(abs(ratio - 1) > 1e-4 for ratio in ratios) / 32
    assert metrics["clip_fraction"] == clipped and 0 < clipped <= 0.5
    assert metrics["ratio_mean"] == pytest.approx(sum(ratios) / 32, rel=1e-12)
    assert (metrics["ratio_min"], metrics["ratio_max"]) == pytest.approx((min(ratios), max(ratios)))
    second_loss = 0.0
    for index in range(16):
        advantage, ratio = float(ADVANTAGES[4 + index // 4]), ratios[16 + index]
        clamped = min(max(ratio, 1 - 1e-4), 1 + 1e-4)
        second_loss += max(-advantage * ratio, -advantage * clamped) / 16
    assert metrics["loss"] == pytest.approx((first["loss"] + second_loss) / 2, abs=1e-6)
    # Before any update the surrogate is minus the mean advantage.
    assert first["loss"] == pytest.approx(-float(ADVANTAGES[:4].mean()), abs=1e-6)
    assert metrics["learning_rate"] == 2e-3


def test_grad_norm_is_that_before_clipping(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    once = tiny_config(policy.folder, algorithm={"updates_per_epoch": 1})
    _, gradient = accumulated(policy, once, rollouts, rollouts.log_probs, micro=4)
    advantages = 100 * ADVANTAGES
    _, metrics = update(policy, initial_state(policy), rollouts, as_credit(advantages), {}, once)
    assert metrics["grad_norm"] == pytest.approx(100 * float(gradient.norm()), rel=1e-5)
    assert metrics["grad_norm"] > once.optimizer.max_grad_norm


def test_progress_ends_at_1(policy: Policy, config: RunConfig, rollouts: Rollouts) -> None:
    shares: list[float] = []
    update(
        policy,
        initial_state(policy),
        rollouts,
        as_credit(ADVANTAGES),
        {},
        config,
        on_progress=shares.append,
    )
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) == 8


# What must stop


def test_a_nan_advantage_stops_before_any_weight_changes(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    before = initial_state(policy)
    for place in (0, 6):  # in the first update, and after it
        advantages = ADVANTAGES.clone()
        advantages[place] = torch.nan
        with pytest.raises(NonFiniteError, match=rf"sample {place} .*at step 0 \(time 751\)"):
            update(policy, before, rollouts, as_credit(advantages), {}, config)
        assert_same_tensors(policy.weights.state(), before.weights)


def test_a_nan_weight_stops_before_any_weight_changes(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    name, parameter = next(iter(policy.weights.parameters().items()))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    before = initial_state(policy)
    with pytest.raises(NonFiniteError, match=r"log-prob nan.*prompt 'a cat'"):
        update(policy, before, rollouts, as_credit(ADVANTAGES), {}, config)
    after = policy.weights.state()
    assert all(after[n].equal(v) or v.isnan().any() for n, v in before.weights.items()), name


def test_an_infinite_gradient_stops_before_any_weight_changes(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    before = initial_state(policy)
    handle = next(iter(policy.weights.parameters().values())).register_hook(
        lambda gradient: gradient + torch.inf
    )
    with pytest.raises(NonFiniteError, match="the gradient's norm is inf"):
        update(policy, before, rollouts, as_credit(ADVANTAGES), {}, config)
    handle.remove()
    assert_same_tensors(policy.weights.state(), before.weights)


def test_an_update_that_stopped_leaves_nothing_behind_for_the_next(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    before = initial_state(policy)
    clean, _ = update(policy, before, rollouts, as_credit(ADVANTAGES), {}, config)
    policy.weights.load(before.weights)

    class Killed(Exception):
        pass

    def stop(share: float) -> None:
        if share > 0.3:
            raise Killed

    with pytest.raises(Killed):
        update(policy, before, rollouts, as_credit(ADVANTAGES), {}, config, on_progress=stop)
    policy.weights.load(before.weights)
    again, _ = update(policy, before, rollouts, as_credit(ADVANTAGES), {}, config)
    assert_same_tensors(again.weights, clean.weights)
