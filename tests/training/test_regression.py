"""Weighted regression on final latents: its gradient, its randomness, its passes and its state."""

from __future__ import annotations

import uuid
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpo.algorithms.denoising import steps_of_pass
from ddpo.algorithms.rwr import Rwr
from ddpo.config import RunConfig
from ddpo.errors import ConfigError, NonFiniteError
from ddpo.models import Policy
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo.training.denoising import DenoisingGradient
from ddpo.training.loop import initial_state, update
from ddpo.training.noising import Noising
from ddpo.training.optimizer import take_step
from ddpo.training.samples import FinalLatents, Rollouts
from ddpo.training.state import TrainState
from tests.checks import check_regression_is_each_samples_own, take_gradients
from tests.states import commit_state
from tests.tiny import (
    PROMPTS,
    as_credit,
    assert_same_tensors,
    ddim_on,
    draw,
    flat,
    grow_adapter,
    load_policy,
    make_float64,
    tiny_config,
)

WEIGHTS = torch.tensor([0.25 + 0.5 * i for i in range(8)])
CREDIT = {"weight": WEIGHTS}
RWR = Rwr(type="rwr")


def rwr_config(model: Path | str, /, **changes: Any) -> RunConfig:
    algorithm = {"type": "rwr", "inner_epochs": 2, "updates_per_epoch": 4}
    return tiny_config(model, **{"algorithm": algorithm, **changes})


def finals_of(rollouts: Rollouts) -> FinalLatents:
    return FinalLatents(rollouts.prompts, rollouts.latents[:, -1])


def exact(finals: FinalLatents) -> FinalLatents:
    return FinalLatents(finals.prompts, finals.latents.double())


# The gradient


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_gradient_is_each_samples_weight_times_that_of_its_denoising_loss(
    tiny_model: Path, tiny_v_model: Path, kind: str
) -> None:
    config = rwr_config(tiny_model if kind == "epsilon" else tiny_v_model)
    policy = load_policy(config)
    grow_adapter(policy)
    latents = draw(policy, config, PROMPTS[:4]).latents[:, -1].double()
    make_float64(policy)
    noising = Noising.draw(0, 0, 0, range(4), policy, ddim_on(policy))
    assert len(set(noising.times.tolist())) == 4
    finals = FinalLatents(PROMPTS[:4], latents)
    check_regression_is_each_samples_own(policy, finals, WEIGHTS[:4], noising)


def test_micro_batches_of_any_size_give_the_same_gradient(
    policy: Policy, rollouts: Rollouts
) -> None:
    make_float64(policy)
    finals = exact(finals_of(rollouts))
    found = []
    for micro in (8, 1, 3, 7):
        policy.numerics = policy.numerics.model_copy(update={"micro_batch_size": micro})
        noising = Noising.draw(0, 0, 0, range(8), policy, ddim_on(policy))
        loss = DenoisingGradient(policy, ddim_on(policy), RWR).accumulate(
            finals, CREDIT, range(8), noising
        )
        found.append((loss, flat(take_gradients(policy))))
    whole_loss, whole = found[0]
    assert whole.abs().max() > 1e-3
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(whole_loss, abs=1e-12)
        torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-12)


def test_the_loss_scale_of_float16_leaves_the_gradient_as_it_is(
    policy: Policy, rollouts: Rollouts
) -> None:
    make_float64(policy)
    finals = exact(finals_of(rollouts))
    noising = Noising.draw(0, 0, 0, range(8), policy, ddim_on(policy))
    plain = DenoisingGradient(policy, ddim_on(policy), RWR)
    loss = plain.accumulate(finals, CREDIT, range(8), noising)
    expected = flat(take_gradients(policy))
    policy.numerics = policy.numerics.model_copy(update={"dtype": "float16"})
    scaled = DenoisingGradient(policy, ddim_on(policy), RWR)
    assert scaled.loss_scale is not None and plain.loss_scale is None
    policy.numerics = policy.numerics.model_copy(update={"dtype": "float32"})
    assert scaled.accumulate(finals, CREDIT, range(8), noising) == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(flat(take_gradients(policy)), expected, rtol=0, atol=1e-12)


def test_guidance_stays_out_of_the_loss(policy: Policy, rollouts: Rollouts) -> None:
    """One forward a sample: with guidance the UNet would see each twice."""
    seen = count_forwards(policy)
    finals, noising = finals_of(rollouts), Noising.draw(0, 0, 0, range(8), policy, ddim_on(policy))
    DenoisingGradient(policy, ddim_on(policy), RWR).accumulate(finals, CREDIT, range(8), noising)
    assert seen == [4, 4]


def count_forwards(policy: Policy) -> list[int]:
    """Return a list that gets the batch size of every forward of the UNet."""
    seen: list[int] = []
    policy.pipeline.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


# Randomness


def test_what_a_sample_draws_depends_on_its_index_and_its_pass_alone(policy: Policy) -> None:
    together = Noising.draw(3, 5, 1, [4, 0, 7], policy, ddim_on(policy))
    alone = Noising.draw(3, 5, 1, [7], policy, ddim_on(policy))
    assert torch.equal(together.noise[2:], alone.noise)
    assert torch.equal(together.times[2:], alone.times)
    for other in ((4, 5, 1), (3, 6, 1), (3, 5, 2)):
        assert not torch.equal(
            Noising.draw(*other, [7], policy, ddim_on(policy)).noise, alone.noise
        )


def test_timesteps_are_uniform_over_training_and_noise_is_standard_normal(policy: Policy) -> None:
    drawn = Noising.draw(0, 0, 0, range(2000), policy, ddim_on(policy))
    timesteps, noise = drawn.times.double(), drawn.noise.double()
    assert 0 <= timesteps.min() < 5 and 994 < timesteps.max() <= 999
    # Five standard errors of uniform numbers from 0 to 999; and of 512,000 normal ones.
    assert abs(float(timesteps.mean()) - 499.5) < 5 * 288.7 / 2000**0.5
    assert float((timesteps < 250).double().mean()) == pytest.approx(0.25, abs=0.05)
    assert abs(float(noise.mean())) < 5 / 512_000**0.5
    assert float(noise.std()) == pytest.approx(1, abs=5 / (2 * 512_000) ** 0.5)


def test_a_pass_sees_every_sample_once_in_an_order_of_its_own() -> None:
    samples = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    steps = steps_of_pass(0, 0, 0, samples, 4)
    assert [len(step) for step in steps] == [3, 3, 2, 2]
    paths = ((0, 0, 0), (0, 0, 1), (0, 1, 0))
    orders = [tuple(chain(*steps_of_pass(*path, samples, 4))) for path in paths]
    assert all(sorted(order) == samples for order in orders)
    assert len({tuple(samples), *orders}) == 4
    assert steps_of_pass(0, 0, 0, samples, 4) == steps


def test_a_pass_over_fewer_samples_than_steps_takes_a_step_a_sample() -> None:
    assert sorted(steps_of_pass(0, 0, 0, [4, 9], 5)) == [[4], [9]]


# The update


def regressed(
    policy: Policy, config: RunConfig, finals: FinalLatents, weights: torch.Tensor = WEIGHTS
) -> tuple[TrainState, dict[str, Any]]:
    return update(policy, initial_state(policy), finals, {"weight": weights}, {}, config)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [{"type": "lora"}, {"type": "full"}])
def test_two_epochs_straight_are_one_and_one_more_from_the_store(
    tiny_model: Path, trainable: dict[str, str]
) -> None:
    config = rwr_config(tiny_model, trainable=trainable, optimizer={"learning_rate": 1e-3})
    policy = load_policy(config)

    def epoch(own: Policy, state: TrainState) -> TrainState:
        drawn = draw(own, config, first_seed=1000 * (state.epoch + 1))
        finals = FinalLatents((PROMPTS * 2)[:8], drawn.latents[:, -1])
        return update(own, state, finals, {"weight": WEIGHTS}, {"a cat": (1.0,)}, config)[0]

    first = epoch(policy, initial_state(policy))
    straight = epoch(policy, first)
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    committed = commit_state(store, first)
    loaded = CHECKPOINT.load(store, committed).state()
    another = load_policy(config)
    another.weights.load(loaded.weights)
    resumed = epoch(another, loaded)

    assert_same_tensors(resumed.weights, straight.weights)
    assert_same_tensors(resumed.optimizer, straight.optimizer)
    assert not torch.equal(flat(straight.weights), flat(first.weights))
    assert (straight.epoch, straight.updates, straight.samples) == (2, 8, 16)
    assert straight.statistics == {"a cat": (1.0,)}


def test_steps_are_those_of_one_adamw_over_the_passes(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    config = rwr_config(policy.folder, optimizer={"learning_rate": 1e-3})
    finals = finals_of(rollouts)
    start = initial_state(policy)
    found, metrics = update(policy, start, finals, {"weight": WEIGHTS}, {}, config)

    policy.weights.load(start.weights)
    parameters = list(policy.weights.parameters().values())
    adamw = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)
    losses = []
    for inner in range(2):
        for step in steps_of_pass(0, 0, inner, range(8), 2):
            assert len(step) == 4
            drawn = Noising.draw(0, 0, inner, step, policy, ddim_on(policy))
            own = [finals.prompts[row] for row in step]
            gradient = DenoisingGradient(policy, ddim_on(policy), RWR)
            credit = {"weight": WEIGHTS[step]}
            batch = gradient.batch(own, finals.latents[step], credit, drawn)
            loss = RWR.losses(batch).sum() / 4
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adamw.step()
            adamw.zero_grad()
            losses.append(float(loss.detach()))
    assert_same_tensors(found.weights, policy.weights.state())
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_the_average_follows_every_step(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, rollouts: Rollouts
) -> None:
    config = rwr_config(tiny_model, optimizer={"learning_rate": 1e-2, "ema_decay": 0.9})
    policy = load_policy(config)
    state = initial_state(policy, ema=True)
    expected = {name: value.double() for name, value in state.weights.items()}

    def then_average(*given: Any) -> float:
        norm = take_step(*given)
        for name, value in policy.weights.state().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
        return norm

    monkeypatch.setattr("ddpo.training.loop.take_step", then_average)
    after, _ = update(policy, state, finals_of(rollouts), {"weight": WEIGHTS}, {}, config)
    assert after.updates == 4 and after.shown_weights is after.ema
    for name, value in expected.items():
        torch.testing.assert_close(after.ema[name].double(), value, rtol=0, atol=1e-6)
    assert max(float((after.ema[n] - w).abs().max()) for n, w in after.weights.items()) > 1e-3


def test_samples_of_weight_0_cost_no_forward_and_change_nothing(
    policy: Policy, rollouts: Rollouts
) -> None:
    config = rwr_config(
        policy.folder,
        algorithm={"type": "rwr_sparse", "inner_epochs": 3, "updates_per_epoch": 3},
    )
    weights = torch.zeros(8)
    weights[[2, 5]] = 1.0
    start = initial_state(policy)
    seen = count_forwards(policy)
    finals = finals_of(rollouts)
    state, metrics = regressed(policy, config, finals, weights)
    assert sum(seen) == 2 * 3  # two samples, three passes
    assert (metrics["trained_samples"], metrics["effective_sample_size"]) == (2, 2.0)

    broken = torch.full_like(finals.latents, torch.nan)
    broken[[2, 5]] = finals.latents[[2, 5]]
    policy.weights.load(start.weights)
    again, _ = regressed(policy, config, replace(finals, latents=broken), weights)
    assert_same_tensors(again.weights, state.weights)


def test_training_lowers_the_weighted_denoising_loss(tiny_model: Path) -> None:
    config = rwr_config(
        tiny_model,
        trainable={"type": "full"},
        algorithm={"type": "rwr", "inner_epochs": 10, "updates_per_epoch": 20},
        optimizer={"learning_rate": 1e-2},
    )
    policy = load_policy(config)
    finals = FinalLatents((PROMPTS * 2)[:8], draw(policy, config).latents[:, -1])
    # Noise that the training does not draw: what is learnt must hold beyond it.
    many = [index % 8 for index in range(32)]
    noising = Noising.draw(77, 0, 0, range(32), policy, ddim_on(policy))

    def weighted_loss() -> float:
        with torch.no_grad():
            prompts = [finals.prompts[row] for row in many]
            gradient = DenoisingGradient(policy, ddim_on(policy), RWR)
            credit = {"weight": WEIGHTS[many]}
            batch = gradient.batch(prompts, finals.latents[many], credit, noising)
        return float(RWR.losses(batch).mean())

    before = weighted_loss()
    regressed(policy, config, finals)
    assert weighted_loss() < 0.9 * before


def test_what_is_measured_is_that_of_the_weights(policy: Policy, rollouts: Rollouts) -> None:
    weights = torch.tensor([0.0, 0.5, 3.0, 0.5, 0.0, 1.0, 1.0, 2.0])
    _, metrics = regressed(policy, rwr_config(policy.folder), finals_of(rollouts), weights)
    assert metrics["weight_max"] == 3.0 and metrics["trained_samples"] == 6
    assert metrics["effective_sample_size"] == pytest.approx(8**2 / 15.5)
    assert metrics["learning_rate"] == 3e-4 and metrics["grad_norm"] > 0
    # No importance ratio, so nothing is said of one.
    assert set(metrics) == {
        "loss", "grad_norm", "learning_rate", "forwards", "sampling_forwards",
        "weight_max", "trained_samples", "effective_sample_size",
    }  # fmt: skip


def test_progress_reaches_the_whole(policy: Policy, rollouts: Rollouts) -> None:
    told: list[float] = []
    config = rwr_config(policy.folder)
    state = initial_state(policy)
    update(
        policy, state, finals_of(rollouts), {"weight": WEIGHTS}, {}, config, on_progress=told.append
    )
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 4


def test_a_loss_that_is_not_finite_is_named_and_leaves_the_weights(
    policy: Policy, rollouts: Rollouts
) -> None:
    finals = finals_of(rollouts)
    finals.latents[6] = torch.nan
    before = initial_state(policy)
    with pytest.raises(NonFiniteError, match=r"for sample 6 \(prompt 'a cat'\) at time \d+"):
        regressed(policy, rwr_config(policy.folder), finals)
    assert_same_tensors(policy.weights.state(), before.weights)


def test_a_policy_gradient_refuses_final_latents(
    policy: Policy, config: RunConfig, rollouts: Rollouts
) -> None:
    with pytest.raises(ConfigError, match="ddpo_is trains on every step of a trajectory"):
        update(policy, initial_state(policy), rollouts.final, as_credit(WEIGHTS), {}, config)


def test_regression_takes_the_clean_latents_of_whole_trajectories(
    policy: Policy, rollouts: Rollouts
) -> None:
    config, start = rwr_config(policy.folder), initial_state(policy)
    expected, _ = regressed(policy, config, finals_of(rollouts))
    policy.weights.load(start.weights)
    found, _ = update(policy, start, rollouts, {"weight": WEIGHTS}, {}, config)
    assert_same_tensors(found.weights, expected.weights)
