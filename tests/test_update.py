from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ddpo.config import RunConfig
from ddpo.errors import NonFiniteError
from ddpo.gradient import Pairs, PolicyGradient, Rollouts, micro_batches
from ddpo.policies import Policy
from ddpo.state import TrainState
from ddpo.store.checkpoints import commit_checkpoint, load_checkpoint
from ddpo.store.objects import Store
from ddpo.update import RatioDeviation, initial_state, update
from tests.checks import (
    check_gradient_is_each_samples_own,
    check_initial_ratio_is_one,
    take_gradients,
)
from tests.tiny import (
    PROMPTS,
    alternating_advantages,
    as_float64,
    draw,
    grow_adapter,
    load_policy,
    make_float64,
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


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in tensors.values()])


def assert_same_tensors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def config(tiny_model: Path) -> RunConfig:
    return tiny_config(tiny_model)


@pytest.fixture
def policy(config: RunConfig) -> Policy:
    policy = load_policy(config)
    grow_adapter(policy)
    return policy


@pytest.fixture
def rollouts(policy: Policy, config: RunConfig) -> Rollouts:
    return rollouts_of(draw(policy, config))


def accumulated(
    policy: Policy, config: RunConfig, rollouts: Rollouts, old: torch.Tensor, micro: int
) -> tuple[float, torch.Tensor]:
    policy.numerics = policy.numerics.model_copy(update={"micro_batch_size": micro})
    gradient = PolicyGradient(policy, config.sampler, config.algorithm)
    loss, _ = gradient.accumulate(rollouts, ADVANTAGES, range(8), old)
    return loss, flat(take_gradients(policy))


# The gradient


def test_micro_batches_cover_every_pair_once_timestep_by_timestep() -> None:
    batches = list(micro_batches([4, 5, 6], [0, 2], 2))
    pairs = [(int(s), int(t)) for b in batches for s, t in zip(b.samples, b.steps, strict=True)]
    assert pairs == [(4, 0), (5, 0), (6, 0), (4, 2), (5, 2), (6, 2)]
    assert [len(b.samples) for b in batches] == [2, 2, 2]


@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_sf"])
def test_micro_batches_of_any_size_give_the_gradient_of_one_backward_over_everything(
    policy: Policy, config: RunConfig, rollouts: Rollouts, algorithm: str
) -> None:
    make_float64(policy)
    exact = as_float64(rollouts)
    updates = 2 if algorithm == "ddpo_is" else 1
    config = tiny_config(policy.folder, algorithm={"type": algorithm, "updates_per_epoch": updates})
    noise = torch.randn(exact.log_probs.shape, generator=torch.Generator().manual_seed(0))
    old = exact.log_probs + 2e-4 * noise  # ratios on both sides of the clip range, and inside

    gradient = PolicyGradient(policy, config.sampler, config.algorithm)
    (everything,) = micro_batches(range(8), gradient.trained_steps(), 32)
    log_probs = gradient.log_probs(exact, everything)
    assert log_probs.dtype == torch.float64
    advantages = ADVANTAGES[everything.samples].double()
    if algorithm == "ddpo_is":
        ratio = (log_probs - old[everything.samples, everything.steps]).exp()
        clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        outside = float(((ratio - 1).abs() > 1e-4).double().mean())
        assert 0.2 < outside < 0.9
    else:
        loss = (-advantages * log_probs).mean()
    loss.backward()
    expected, whole_loss = flat(take_gradients(policy)), float(loss.detach())
    assert expected.abs().max() > 1e-3

    for micro in (1, 3, 7, 32):
        found_loss, found = accumulated(policy, config, exact, old, micro)
        assert found_loss == pytest.approx(whole_loss, abs=1e-10)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_gradient_is_each_samples_advantage_times_its_score(
    tiny_model: Path, tiny_v_model: Path, kind: str
) -> None:
    config = tiny_config(tiny_model if kind == "epsilon" else tiny_v_model)
    policy = load_policy(config)
    grow_adapter(policy)
    rollouts = as_float64(rollouts_of(draw(policy, config, PROMPTS[:4]), PROMPTS[:4]))
    make_float64(policy)
    check_gradient_is_each_samples_own(policy, config, rollouts, alternating_advantages(4))


def test_gradient_checkpointing_changes_no_bit(tiny_model: Path) -> None:
    found = []
    for checkpointing in (False, True):
        config = tiny_config(tiny_model, numerics={"gradient_checkpointing": checkpointing})
        policy = load_policy(config)
        assert policy.pipeline.unet.is_gradient_checkpointing == checkpointing
        drawn = rollouts_of(draw(policy, config))
        found.append(update(policy, initial_state(policy), drawn, ADVANTAGES, {}, config)[0])
    assert_same_tensors(found[1].weights, found[0].weights)


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
    _, metrics = update(policy, initial_state(policy), rollouts, ADVANTAGES, {}, config)
    assert metrics.initial_ratio_deviation.max < 5e-6
    assert not metrics.recomputed_log_probs


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
    _, metrics = update(policy, initial_state(policy), rollouts, ADVANTAGES, {}, config)
    assert metrics.initial_ratio_deviation.max == 0.0
    assert not metrics.recomputed_log_probs


def other_order(rollouts: Rollouts) -> Rollouts:
    """Pair every sample with other neighbours, and perturb log-probs as another graph would."""
    noise = torch.randn(rollouts.log_probs.shape, generator=torch.Generator().manual_seed(1))
    return Rollouts(
        rollouts.prompts,
        rollouts.latents,
        rollouts.log_probs + 1e-3 * noise,
        rollouts.timesteps,
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
    after, metrics = update(policy, state, other_order(rollouts), ADVANTAGES, {}, config)
    assert_same_tensors(after.weights, state.weights)
    assert metrics.recomputed_log_probs
    assert metrics.ratio_min == metrics.ratio_max == 1.0
    assert metrics.clip_fraction == 0.0
    # What is measured is the stored log-probs' deviation all the same.
    assert metrics.initial_ratio_deviation.p99 > 1e-4


@pytest.mark.parametrize("micro", [3, 8])
def test_log_probs_are_recomputed_in_the_very_batches_that_the_updates_see(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """A tiny model may round alike in all batches; Stable Diffusion does not."""
    policy, config, rollouts = bfloat16_run(tiny_model, "recompute", micro)
    seen: list[tuple[bool, list[int], list[int]]] = []
    right = PolicyGradient.log_probs

    def recorded(self: PolicyGradient, rollouts: Rollouts, pairs: Pairs) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), pairs.samples.tolist(), pairs.steps.tolist()))
        return right(self, rollouts, pairs)

    monkeypatch.setattr(PolicyGradient, "log_probs", recorded)
    update(policy, initial_state(policy), rollouts, ADVANTAGES, {}, config)
    recomputed, trained = ([rest for g, *rest in seen if g == grad] for grad in (False, True))
    assert recomputed == trained and len(trained) == 2 * math.ceil(16 / micro)


def test_stored_log_probs_are_used_as_they_are(tiny_model: Path) -> None:
    policy, config, rollouts = bfloat16_run(tiny_model, "stored", 4, _STILL)
    _, metrics = update(
        policy, initial_state(policy), other_order(rollouts), ADVANTAGES, {}, config
    )
    assert not metrics.recomputed_log_probs
    assert metrics.ratio_min < 1 - 5e-4 and metrics.ratio_max > 1 + 5e-4
    assert metrics.clip_fraction > 0.5


def test_auto_recomputes_where_low_precision_leaves_a_tenth_of_the_clip_range(
    tiny_model: Path,
) -> None:
    policy, config, rollouts = bfloat16_run(tiny_model, "auto", 4, _STILL)
    _, metrics = update(
        policy, initial_state(policy), other_order(rollouts), ADVANTAGES, {}, config
    )
    assert metrics.recomputed_log_probs and metrics.clip_fraction == 0.0


def test_auto_trusts_float32(policy: Policy, config: RunConfig, rollouts: Rollouts) -> None:
    _, metrics = update(
        policy, initial_state(policy), other_order(rollouts), ADVANTAGES, {}, config
    )
    assert not metrics.recomputed_log_probs


def test_the_deviation_is_told_apart_by_timestep(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    rollouts.log_probs[1, 2] += 1e-3  # sample 1 at timestep 251
    _, metrics = update(policy, initial_state(policy), rollouts, ADVANTAGES, {}, config)
    by_timestep = metrics.initial_ratio_deviation_by_timestep
    assert {timestep: d.max > 0 for timestep, d in by_timestep.items()} == {
        751: False,
        501: False,
        251: True,
        1: False,
    }
    expected = 1 - math.exp(-1e-3)
    assert metrics.initial_ratio_deviation.max == pytest.approx(expected, rel=1e-3)
    # Over the first update's four samples and four timesteps.
    assert metrics.initial_ratio_deviation.mean == pytest.approx(expected / 16, rel=1e-3)
    assert metrics.document()["initial_ratio_deviation_by_timestep"]["501"]["max"] == 0.0


# State


def epoch_of(
    policy: Policy, state: TrainState, config: RunConfig, epoch: int
) -> tuple[TrainState, Rollouts]:
    rollouts = rollouts_of(draw(policy, config, first_seed=1000 * (epoch + 1)))
    statistics = {"a cat": (float(epoch), 1.0)}
    return update(policy, state, rollouts, ADVANTAGES, statistics, config)[0], rollouts


@pytest.mark.parametrize("trainable", [{"type": "lora"}, FULL])
def test_two_epochs_straight_are_one_and_one_more_from_the_store(
    tiny_model: Path, trainable: dict[str, str]
) -> None:
    config = tiny_config(tiny_model, trainable=trainable, optimizer={"learning_rate": 1e-3})
    policy = load_policy(config)
    first, _ = epoch_of(policy, initial_state(policy), config, 0)
    straight, _ = epoch_of(policy, first, config, 1)

    store = Store.open(f"memory://{uuid.uuid4().hex}")
    committed = commit_checkpoint(store, "r", first, inputs={}, documents={})
    loaded = load_checkpoint(store, committed.ref)
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
    gradient = PolicyGradient(plain, config.sampler, config.algorithm)
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
        update(policy, initial_state(policy), rollouts, advantages, {}, config)
        gradient = PolicyGradient(policy, config.sampler, config.algorithm)
        new = gradient.recompute(rollouts, range(8))
        moved = sign * (new[2] - rollouts.log_probs[2]).mean()
        assert moved > 1e-5


def test_metrics_are_their_plain_formulas(policy: Policy, tiny_model: Path) -> None:
    config = tiny_config(tiny_model, optimizer={"learning_rate": 2e-3})
    rollouts = rollouts_of(draw(policy, config))
    start = initial_state(policy)
    _, metrics = update(policy, start, rollouts, ADVANTAGES, {}, config)

    # The first half's update by itself, and what it makes of the second half's log-probs.
    policy.weights.load(start.weights)
    half = Rollouts(
        rollouts.prompts[:4], rollouts.latents[:4], rollouts.log_probs[:4], rollouts.timesteps
    )
    once = tiny_config(
        tiny_model, optimizer={"learning_rate": 2e-3}, algorithm={"updates_per_epoch": 1}
    )
    _, first = update(policy, start, half, ADVANTAGES[:4], {}, once)
    gradient = PolicyGradient(policy, config.sampler, config.algorithm)
    new = gradient.recompute(rollouts, range(4, 8))[4:].double()
    old = rollouts.log_probs[4:].double()
    differences = [0.0] * 16 + (new - old).flatten().tolist()
    ratios = [math.exp(d) for d in differences]

    assert metrics.approx_kl == pytest.approx(sum(d * d for d in differences) / 2 / 32, rel=1e-9)
    clipped = sum(abs(ratio - 1) > 1e-4 for ratio in ratios) / 32
    assert metrics.clip_fraction == clipped and 0 < clipped <= 0.5
    assert metrics.ratio_mean == pytest.approx(sum(ratios) / 32, rel=1e-12)
    assert (metrics.ratio_min, metrics.ratio_max) == pytest.approx((min(ratios), max(ratios)))
    second_loss = 0.0
    for index in range(16):
        advantage, ratio = float(ADVANTAGES[4 + index // 4]), ratios[16 + index]
        clamped = min(max(ratio, 1 - 1e-4), 1 + 1e-4)
        second_loss += max(-advantage * ratio, -advantage * clamped) / 16
    assert metrics.loss == pytest.approx((first.loss + second_loss) / 2, abs=1e-6)
    # Before any update the surrogate is minus the mean advantage.
    assert first.loss == pytest.approx(-float(ADVANTAGES[:4].mean()), abs=1e-6)
    assert metrics.learning_rate == 2e-3


def test_grad_norm_is_that_before_clipping(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    once = tiny_config(policy.folder, algorithm={"updates_per_epoch": 1})
    _, gradient = accumulated(policy, once, rollouts, rollouts.log_probs, micro=4)
    advantages = 100 * ADVANTAGES
    _, metrics = update(policy, initial_state(policy), rollouts, advantages, {}, once)
    assert metrics.grad_norm == pytest.approx(100 * float(gradient.norm()), rel=1e-5)
    assert metrics.grad_norm > once.optimizer.max_grad_norm


def test_progress_ends_at_1(policy: Policy, config: RunConfig, rollouts: Rollouts) -> None:
    shares: list[float] = []
    update(
        policy,
        initial_state(policy),
        rollouts,
        ADVANTAGES,
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
        with pytest.raises(NonFiniteError, match=rf"sample {place} .*at timestep 751"):
            update(policy, before, rollouts, advantages, {}, config)
        assert_same_tensors(policy.weights.state(), before.weights)


def test_a_nan_weight_stops_before_any_weight_changes(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    name, parameter = next(iter(policy.weights.parameters().items()))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    before = initial_state(policy)
    with pytest.raises(NonFiniteError, match=r"log-prob nan.*prompt 'a cat'"):
        update(policy, before, rollouts, ADVANTAGES, {}, config)
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
        update(policy, before, rollouts, ADVANTAGES, {}, config)
    handle.remove()
    assert_same_tensors(policy.weights.state(), before.weights)


def test_an_update_that_stopped_leaves_nothing_behind_for_the_next(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    before = initial_state(policy)
    clean, _ = update(policy, before, rollouts, ADVANTAGES, {}, config)
    policy.weights.load(before.weights)

    class Killed(Exception):
        pass

    def stop(share: float) -> None:
        if share > 0.3:
            raise Killed

    with pytest.raises(Killed):
        update(policy, before, rollouts, ADVANTAGES, {}, config, on_progress=stop)
    policy.weights.load(before.weights)
    again, _ = update(policy, before, rollouts, ADVANTAGES, {}, config)
    assert_same_tensors(again.weights, clean.weights)
