"""NFT and AWM in training: their gradient, what they noise with, and the old weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpo.algorithms.base import Update
from ddpo.algorithms.denoising import Times
from ddpo.basics.randomness import derive_seed, generator
from ddpo.config import RunConfig
from ddpo.models import Policy
from ddpo.training.denoising import DenoisingObjective
from ddpo.training.loop import initial_state, update
from ddpo.training.noising import Noiser
from ddpo.training.ranks import Alone
from ddpo.training.samples import FinalLatents
from ddpo.training.state import TrainState
from tests.checks import take_gradients
from tests.tiny import (
    PROMPTS,
    alternating_advantages,
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

ADVANTAGES = [-6.0, 1.0, 2.5, -0.5]
BATCH = {"type": "batch"}


def nft_config(model: Path | str, /, **changes: Any) -> RunConfig:
    algorithm = {
        "type": "nft",
        "beta": 0.5,
        "kl_weight": 0.2,
        "advantages": BATCH,
        "old_decay": {"per_step": 0.25, "most": 0.75},
    }
    return tiny_config(model, **{"algorithm": algorithm, "sampler": {"eta": 0}, **changes})


def unlike(state: TrainState, scale: float) -> dict[str, Tensor]:
    """Return weights beside those of a state."""
    return {name: scale * value for name, value in state.weights.items()}


def noise_at(sample: int, step: int) -> Tensor:
    """Return the noise of a sample at a step, in the first pass of epoch 0 of seed 0."""
    seed = derive_seed(0, "noising", 0, 0, sample, step)
    return torch.randn(1, 4, 8, 8, generator=generator(seed)).double()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_gradient_of_nft_is_that_of_each_sample_at_each_time(
    tiny_model: Path, tiny_v_model: Path, kind: str
) -> None:
    """One forward a sample, time and weight set; the gradient by the prediction by hand."""
    config = nft_config(tiny_model if kind == "epsilon" else tiny_v_model)
    policy = load_policy(config)
    grow_adapter(policy)
    latents = draw(policy, config, PROMPTS[:4]).latents[:, -1].double()
    make_float64(policy)
    state = initial_state(policy)
    old = unlike(state, 0.5)
    credit = as_credit(torch.tensor(ADVANTAGES))
    whole = Update(range(4))
    objective = DenoisingObjective(
        policy,
        replace(state, old=old),
        FinalLatents(PROMPTS[:4], latents),
        credit,
        [whole],
        config,
        Alone(),
    )
    assert objective.items_per_sample == 3
    loss = objective.accumulate(whole, None, lambda count: None)
    found = take_gradients(policy)
    assert_same_tensors(policy.weights.state(), state.weights)

    pipeline = policy.pipeline
    pipeline.scheduler.set_timesteps(4)
    times = [int(time) for time in pipeline.scheduler.timesteps][:3]  # 99% of 4, rounded down
    betas = pipeline.scheduler.betas.double()
    expected_loss, beta, clip, weight = 0.0, 0.5, 5.0, 0.2
    for row, prompt in enumerate(PROMPTS[:4]):
        text = pipeline.encode_prompt(prompt, policy.device, 1, False)[0]
        better = (max(ADVANTAGES[row], -clip) / clip + 1) / 2
        for step, time in enumerate(times):
            alpha = math.prod(1 - float(each) for each in betas[: time + 1])
            clean = latents[row : row + 1]
            noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise_at(row, step)
            with torch.no_grad():
                policy.weights.load(old)
                v_old = pipeline.unet(noisy, time, text).sample
                pipeline.unet.disable_adapters()
                v_base = pipeline.unet(noisy, time, text).sample
                pipeline.unet.enable_adapters()
                policy.weights.load(state.weights)
            new = pipeline.unet(noisy, time, text).sample
            v = new.detach()
            if kind == "epsilon":
                a, b = alpha**-0.5, -((1 / alpha - 1) ** 0.5)
            else:
                a, b = alpha**0.5, -((1 - alpha) ** 0.5)
            expected = weight * float(((v - v_base) ** 2).mean())
            gradient = weight * 2 * (v - v_base) / v.numel()
            for share, sign in ((better, 1), (1 - better, -1)):
                error = a * noisy + b * (v_old + sign * beta * (v - v_old)) - clean
                size = float(error.abs().mean())
                expected += clip * share / beta * float((error**2).mean()) / size
                gradient = gradient + sign * share * clip * 2 * b * error / size / v.numel()
            expected_loss += expected / 12
            new.backward(gradient / 12)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    right = take_gradients(policy)
    assert right.keys() == found.keys()
    largest = max(float(value.abs().max()) for value in right.values())
    assert largest > 1e-4, "the gradient vanishes: this check could not fail"
    for name, value in right.items():
        assert float((found[name] - value).abs().max()) < 1e-4 * largest, name
    measures = objective.metrics()
    assert measures.keys() == {"distance_to_base", "distance_to_old"}
    assert min(measures.values()) > 0


def test_a_policy_that_is_its_own_old_and_start_is_moved_by_the_advantages_alone(
    policy: Policy,
) -> None:
    """At the start of a run: all weight sets predict the same, so nothing holds the policy."""
    algorithm = {"type": "awm", "updates_per_epoch": 2, "kl_weight": 0, "advantages": BATCH}
    config = nft_config(policy.folder, algorithm=algorithm)
    finals = FinalLatents((PROMPTS * 2)[:8], draw(policy, config).latents[:, -1])
    state = initial_state(policy, old=True)
    updates = config.algorithm.updates(as_credit(torch.ones(8)), run_seed=0, epoch=0)
    objective = DenoisingObjective(
        policy, state, finals, as_credit(torch.zeros(8)), updates, config, Alone()
    )
    objective.accumulate(updates[0], None, lambda count: None)
    gradients = take_gradients(policy)
    assert max(float(each.abs().max()) for each in gradients.values()) < 1e-6
    assert objective.metrics() == pytest.approx({"distance_to_old": 0.0, "clip_fraction": 0.0})


def test_a_reference_has_no_gradient_and_stays_as_it_is_while_the_policy_learns(
    tiny_model: Path,
) -> None:
    config = nft_config(tiny_model, optimizer={"learning_rate": 0.1})
    policy = load_policy(config)
    grow_adapter(policy)
    finals = FinalLatents((PROMPTS * 2)[:8], draw(policy, config).latents[:, -1])
    state = replace(initial_state(policy), old=unlike(initial_state(policy), 0.5))
    before = {name: value.clone() for name, value in state.old.items()}
    credit = as_credit(alternating_advantages(8))
    after, metrics = update(policy, state, finals, credit, {}, config)
    assert_same_tensors(state.old, before)
    assert (flat(after.weights) - flat(state.weights)).abs().max() > 1e-2
    assert metrics["distance_to_base"] > 0 and metrics["distance_to_old"] > 0
    with policy.weights.use("old"):
        assert_same_tensors(policy.weights.state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_old_weights_follow_once_an_epoch_by_the_schedule(tiny_model: Path, kind: str) -> None:
    algorithm = {
        "type": "nft",
        "kl_weight": 0,
        "updates_per_epoch": 2,
        "advantages": BATCH,
        "old_decay": {"after": 1, "per_step": 0.25, "most": 0.6},
    }
    config = nft_config(
        tiny_model,
        algorithm=algorithm,
        trainable={"type": kind},
        optimizer={"learning_rate": 1e-2},
    )
    policy = load_policy(config)
    state = initial_state(policy, old=True)
    assert_same_tensors(state.old, state.weights)
    finals = FinalLatents((PROMPTS * 2)[:8], draw(policy, config).latents[:, -1])
    expected = {name: value.double() for name, value in state.weights.items()}
    for decay in (0.25, 0.6):  # after 2 steps, and after 4
        credit = as_credit(alternating_advantages(8))
        state, _ = update(policy, state, finals, credit, {}, config)
        for name, value in state.weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
            torch.testing.assert_close(state.old[name].double(), expected[name], rtol=0, atol=1e-6)
    assert (flat(state.old) - flat(state.weights)).abs().max() > 1e-3
    assert_same_tensors(policy.weights.state(), state.weights)


@pytest.mark.parametrize(
    ("times", "parts"),
    [
        (Times("sampler", share=0.99), [[0], [1], [2], [3], [4], [5], [6], [7], [8]]),
        (Times("sampler", share=0.9, count=3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        (Times("sampler", share=0.9, count=2), [[0, 1, 2, 3], [4, 5, 6, 7, 8]]),
        (Times("sampler", share=0.25, count=6), [[0], [1]]),
        (Times("sampler", share=0.05), [[0]]),
    ],
)
def test_times_are_the_samplers_own_one_of_each_part_in_random_order(
    policy: Policy, times: Times, parts: list[list[int]]
) -> None:
    process = ddim_on(policy, steps=10)
    noiser = Noiser(policy, process, times, 3, 5)
    assert noiser.times_per_sample == len(parts)
    orders, seen = set(), set()
    for sample in range(60):
        steps = noiser.steps_of(1, sample)
        assert steps == noiser.steps_of(1, sample)
        assert all(step in part for step, part in zip(sorted(steps), parts, strict=True))
        orders.add(tuple(sorted(range(len(steps)), key=lambda i, own=steps: own[i])))
        seen |= {*steps}
    assert seen == {step for part in parts for step in part}
    assert len(orders) > 1 or len(parts) == 1
    noising = noiser.of(Update([7, 2], inner_epoch=1))
    assert noising.samples == [7, 2] * len(parts)
    drawn = noising.part(torch.arange(len(noising.samples)))
    order = [step for pair in zip(*(noiser.steps_of(1, s) for s in (7, 2)), strict=True)
             for step in pair]  # fmt: skip
    assert drawn.times.tolist() == [float(process.times[step]) for step in order]


def test_noise_depends_on_seed_epoch_pass_sample_and_step_alone(policy: Policy) -> None:
    process = ddim_on(policy, steps=10)
    times = Times("sampler")

    def noise(seed: int, epoch: int, inner: int, samples: list[int]) -> dict[Any, bytes]:
        noising = Noiser(policy, process, times, seed, epoch).of(Update(samples, inner))
        drawn = noising.part(torch.arange(len(noising.samples)))
        keys = zip(noising.samples, drawn.times.tolist(), strict=True)
        return {key: value.numpy().tobytes() for key, value in zip(keys, drawn.noise, strict=True)}

    together, alone = noise(3, 5, 1, [4, 0, 7]), noise(3, 5, 1, [7])
    assert len(set(together.values())) == 30
    assert {key: value for key, value in together.items() if key[0] == 7} == alone
    for other in ((4, 5, 1), (3, 6, 1), (3, 5, 2)):
        assert not {*noise(*other, [7]).values()} & {*alone.values()}
