"""DPO in training: the gradient of pairs that share their noise, and epochs without a pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpo.algorithms import Dpo
from ddpo.algorithms.base import Update
from ddpo.algorithms.denoising import Times
from ddpo.basics.randomness import derive_seed, generator
from ddpo.config import RunConfig
from ddpo.models import Policy
from ddpo.models.weights import Weights
from ddpo.training import denoising
from ddpo.training.denoising import DenoisingObjective
from ddpo.training.loop import initial_state, update
from ddpo.training.noising import Noiser
from ddpo.training.ranks import Alone
from ddpo.training.samples import FinalLatents
from tests.checks import take_gradients
from tests.tiny import (
    PROMPTS,
    Credit,
    assert_same_tensors,
    ddim_on,
    draw,
    flat,
    grow_adapter,
    load_policy,
    make_float64,
    tiny_config,
)

BETA = 5.0
PAIRS = ((3, 1), (4, 5))
"""Of six samples, the better one first; 0 and 2 have no pair."""


def dpo_config(model: Path | str, /, **changes: Any) -> RunConfig:
    settings = {
        "algorithm": {"type": "dpo", "beta": BETA, "updates_per_epoch": 1},
        "rollouts": {"samples_per_prompt": 4},
        "sampler": {"eta": 0},
        "numerics": {"micro_batch_size": 2},
    }
    return tiny_config(model, **{**settings, **changes})


def credit_of(pairs: tuple[tuple[int, int], ...], count: int) -> Credit:
    pair, preferred = torch.full((count,), -1.0), torch.zeros(count)
    for number, (better, worse) in enumerate(pairs):
        pair[[better, worse]], preferred[better] = number, 1.0
    return {"reward": torch.zeros(count), "pair": pair, "preferred": preferred}


def check_the_gradient_of_pairs(model: Path, kind: str) -> None:
    """One forward a sample and weight set; reference is the model without its adapter."""
    config = dpo_config(model)
    policy = load_policy(config)
    grow_adapter(policy)
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 2
    latents = draw(policy, config, prompts).latents[:, -1].double()
    make_float64(policy)
    state, credit = initial_state(policy), credit_of(PAIRS, 6)
    updates = config.algorithm.updates(credit, run_seed=config.seed, epoch=0)
    assert len(updates) == 1
    objective = DenoisingObjective(
        policy, state, FinalLatents(prompts, latents), credit, updates, config, Alone()
    )
    loss = objective.accumulate(updates[0], None, lambda count: None)
    found = take_gradients(policy)
    assert_same_tensors(policy.weights.state(), state.weights)

    pipeline = policy.pipeline
    betas = pipeline.scheduler.betas.double()
    expected, margins = 0.0, []
    for pair in PAIRS:
        source = generator(derive_seed(0, "regression", 0, 0, pair[0]))
        time = int(ddim_on(policy).schedule.training_time(source))
        noise = torch.randn(1, 4, 8, 8, generator=source).double()
        alpha = math.prod(1 - float(each) for each in betas[: time + 1])
        predictions, errors, slopes = [], [], []
        for row in pair:
            text = pipeline.encode_prompt(prompts[row], policy.device, 1, False)[0]
            clean = latents[row : row + 1]
            noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
            target = noise if kind == "epsilon" else alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
            with torch.no_grad():
                pipeline.unet.disable_adapters()
                base = pipeline.unet(noisy, time, text).sample
                pipeline.unet.enable_adapters()
            new = pipeline.unet(noisy, time, text).sample
            v = new.detach()
            predictions.append(new)
            errors.append(float(((v - target) ** 2).mean() - ((base - target) ** 2).mean()))
            slopes.append(2 * (v - target) / v.numel())
        margin = -BETA / 2 * (errors[0] - errors[1])
        margins.append(margin)
        expected += math.log(1 + math.exp(-margin)) / len(PAIRS)
        strength = BETA / 2 / (1 + math.exp(margin)) / len(PAIRS)
        predictions[0].backward(strength * slopes[0])
        predictions[1].backward(-strength * slopes[1])
    assert loss == pytest.approx(expected, rel=1e-4)
    right = take_gradients(policy)
    assert right.keys() == found.keys()
    largest = max(float(value.abs().max()) for value in right.values())
    assert largest > 1e-4, "the gradient vanishes: this check could not fail"
    for name, value in right.items():
        assert float((found[name] - value).abs().max()) < 1e-4 * largest, name
    measures = objective.metrics()
    assert measures["implicit_accuracy"] == sum(each > 0 for each in margins) / 2
    assert measures["implicit_margin"] == pytest.approx(sum(margins) / 2, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_gradient_is_that_of_each_pair_with_one_time_and_noise(
    tiny_model: Path, tiny_v_model: Path, kind: str
) -> None:
    check_the_gradient_of_pairs(tiny_model if kind == "epsilon" else tiny_v_model, kind)


def _cross_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dpo, "trained", lambda self, credit: [3, 5, 4, 1])


def _swap_the_samples_of_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dpo, "trained", lambda self, credit: [1, 3, 5, 4])


def _let_the_reference_be_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "use", lambda self, name: nullcontext())


def _noise_each_sample_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoising, "Noiser", lambda *given: Noiser(*given[:-1], together=1))


@pytest.mark.parametrize(
    "plant",
    [
        _cross_prompts,
        _swap_the_samples_of_a_pair,
        _let_the_reference_be_the_policy,
        _noise_each_sample_by_itself,
    ],
)
def test_bugs_planted_in_pairs_are_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_the_gradient_of_pairs(tiny_model, "epsilon")


def test_micro_batches_of_any_even_size_give_the_same_gradient(tiny_model: Path) -> None:
    config = dpo_config(tiny_model)
    policy = load_policy(config)
    grow_adapter(policy)
    finals = FinalLatents([PROMPTS[0]] * 6, draw(policy, config, [PROMPTS[0]] * 6).latents[:, -1])
    make_float64(policy)
    finals = FinalLatents(finals.prompts, finals.latents.double())
    credit = credit_of(((3, 1), (4, 5), (0, 2)), 6)
    updates = config.algorithm.updates(credit, run_seed=0, epoch=0)
    found = []
    for micro in (2, 4, 6):
        policy.numerics = policy.numerics.model_copy(update={"micro_batch_size": micro})
        state = initial_state(policy)
        objective = DenoisingObjective(policy, state, finals, credit, updates, config, Alone())
        loss = objective.accumulate(updates[0], None, lambda count: None)
        found.append((loss, flat(take_gradients(policy))))
    whole_loss, whole = found[0]
    assert whole.abs().max() > 1e-4
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(whole_loss, abs=1e-10)
        torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("times", [Times(), Times("sampler", count=3)])
def test_samples_that_are_compared_share_their_times_and_noise(
    policy: Policy, times: Times
) -> None:
    process = ddim_on(policy, steps=10)

    def drawn(samples: list[int], together: int) -> tuple[list[int], Any]:
        noiser = Noiser(policy, process, times, 3, 5, together)
        noising = noiser.of(Update(samples, inner_epoch=1))
        return noising.samples, noising.part(torch.arange(len(noising.samples)))

    samples, pairs = drawn([7, 2, 4, 9], 2)
    alone, single = drawn([7, 4], 1)
    turns = len(alone) // 2
    assert samples == [7, 2, 4, 9] * turns
    assert torch.equal(pairs.noise[::2], pairs.noise[1::2])
    assert torch.equal(pairs.times[::2], pairs.times[1::2])
    # As the first of them has by itself.
    assert torch.equal(pairs.noise[::2], single.noise)
    assert torch.equal(pairs.times[::2], single.times)
    assert len({each.numpy().tobytes() for each in pairs.noise[::2]}) == 2 * turns


def test_steps_prefer_the_better_samples_and_leave_the_base_model_as_it_is(
    tiny_model: Path,
) -> None:
    """From the base model itself, where nothing is preferred; always at the same noise."""
    algorithm = {"type": "dpo", "beta": 500.0, "updates_per_epoch": 1}
    config = dpo_config(tiny_model, algorithm=algorithm, optimizer={"learning_rate": 2e-3})
    policy = load_policy(config)
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    finals = FinalLatents(prompts, draw(policy, config, prompts).latents[:, -1])
    frozen = {n: p.clone() for n, p in policy.pipeline.unet.named_parameters() if "lora" not in n}
    state, seen = initial_state(policy), []
    for _ in range(6):
        state = replace(state, epoch=0)
        state, metrics = update(policy, state, finals, credit_of(PAIRS, 8), {}, config)
        seen.append(metrics)
    assert seen[0]["implicit_margin"] == pytest.approx(0, abs=1e-3)
    assert seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert seen[-1]["implicit_margin"] > 0.01 and seen[-1]["implicit_accuracy"] == 1
    assert seen[-1]["loss"] < math.log(2) - 0.005
    assert all(each["pairs"] == 2 for each in seen)
    for name, parameter in policy.pipeline.unet.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_an_epoch_without_a_pair_takes_no_step_and_goes_on(tiny_model: Path) -> None:
    config = dpo_config(tiny_model, optimizer={"learning_rate": 0.1, "ema_decay": 0.9})
    policy = load_policy(config)
    grow_adapter(policy)
    prompts = [PROMPTS[0]] * 8
    finals = FinalLatents(prompts, draw(policy, config, prompts).latents[:, -1])
    state = initial_state(policy, ema=True)
    credit = credit_of(PAIRS, 8)
    forwards: list[int] = []
    policy.pipeline.unet.register_forward_pre_hook(lambda _, given: forwards.append(len(given[0])))
    learned, _ = update(policy, state, finals, credit, {}, config)
    assert forwards == [2, 2, 2, 2]  # both pairs by the base model, then by the policy
    after, metrics = update(policy, learned, finals, credit_of((), 8), {}, config)
    assert len(forwards) == 4
    for name in ("weights", "optimizer", "ema"):
        assert_same_tensors(getattr(after, name), getattr(learned, name))
    assert (after.epoch, after.updates, after.samples) == (2, 1, 16)
    assert metrics["loss"] is None and metrics["grad_norm"] is None
    assert metrics["pairs"] == 0 and "implicit_accuracy" not in metrics
