"""The KL divergence from the base model: its formula, its gradient, what it holds the policy to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpo.algorithms.kl import gaussian_kl
from ddpo.config import RunConfig
from ddpo.errors import ConfigError
from ddpo.models import Policy
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.checks import accumulated, ddim_reference, take_gradients
from tests.tiny import (
    alternating_advantages,
    as_credit,
    as_float64,
    assert_same_tensors,
    draw,
    flat,
    load_policy,
    make_float64,
    rollouts_of,
    tiny_config,
)

ADVANTAGES = alternating_advantages(8)
CREDIT = as_credit(ADVANTAGES)
WEIGHT = 0.7
ROWS = range(2, 5)


def penalised(model: Path, kind: str = "ddpo_sf", weight: float = WEIGHT, **optimizer) -> RunConfig:
    algorithm = {"type": kind, "updates_per_epoch": 1, "kl_weight": weight}
    return tiny_config(model, algorithm=algorithm, optimizer=optimizer)


def test_the_divergence_is_that_of_two_normal_distributions_averaged_over_dimensions() -> None:
    source = torch.Generator().manual_seed(0)
    mean, base = torch.randn((2, 5, 4, 8, 8), generator=source, dtype=torch.float64)
    std = torch.rand((5, 1, 1, 1), generator=source, dtype=torch.float64) + 0.05
    expected = kl_divergence(Normal(mean, std), Normal(base, std)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, base, std), expected, rtol=1e-12, atol=0)
    assert expected.min() > 0.1


@pytest.mark.parametrize("kind", ["ddpo_is", "ddpo_sf"])
def test_loss_and_gradient_are_those_of_the_formula_written_out(
    policy: Policy, rollouts: Rollouts, kind: str
) -> None:
    config = penalised(policy.folder, kind)
    base = load_policy(tiny_config(policy.folder))  # its adapter still adds nothing
    make_float64(policy)
    make_float64(base)
    exact = as_float64(rollouts)
    gradient = TrajectoryGradient(policy, config.sampler, config.algorithm)
    old = gradient.recompute(exact, ROWS)
    found = gradient.accumulate(exact, ADVANTAGES, ROWS, old)
    found_gradient = flat(take_gradients(policy))

    loss, divergence = written_out(policy, base, exact, kind)
    loss.backward()
    expected = flat(take_gradients(policy))
    largest = expected.abs().max()
    # float32 alphas in the library against float64 ones here.
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found.measured["kl_to_base"] == pytest.approx(divergence, rel=1e-5)
    assert (found_gradient - expected).abs().max() < 1e-5 * largest
    plain = tiny_config(policy.folder, algorithm={"type": kind, "updates_per_epoch": 1})
    TrajectoryGradient(policy, plain.sampler, plain.algorithm).accumulate(
        exact, ADVANTAGES, ROWS, old
    )
    without = flat(take_gradients(policy))
    assert (without - expected).abs().max() > 0.05 * largest


def written_out(
    policy: Policy, base: Policy, rollouts: Rollouts, kind: str
) -> tuple[torch.Tensor, float]:
    """One forward a pair and model; at a ratio of 1, DDPO-IS is -A."""
    scheduler = policy.pipeline.scheduler
    scheduler.set_timesteps(4)
    timesteps = [int(t) for t in scheduler.timesteps]
    loss, divergence = torch.zeros((), dtype=torch.float64), 0.0
    for row in ROWS:
        prompt = rollouts.prompts[row]
        for step, timestep in enumerate(timesteps):
            latents = rollouts.latents[row : row + 1, step]

            def mean_of(model: Policy, latents=latents, timestep=timestep, prompt=prompt):
                unet = model.pipeline.unet
                empty, text = (
                    model.pipeline.encode_prompt(words, "cpu", 1, False)[0]
                    for words in ("", prompt)
                )
                without = unet(latents, timestep, empty).sample
                output = without + 3.0 * (unet(latents, timestep, text).sample - without)
                return ddim_reference(
                    scheduler.alphas_cumprod.double(),
                    timestep,
                    timestep - 250,
                    latents,
                    output,
                    eta=1.0,
                    prediction_type="epsilon",
                    final_alpha=float(scheduler.final_alpha_cumprod),
                )

            mean, std = mean_of(policy)
            with torch.no_grad():
                base_mean, _ = mean_of(base)
            log_prob = Normal(mean, std).log_prob(rollouts.latents[row : row + 1, step + 1]).mean()
            if kind == "ddpo_is":
                log_prob = torch.exp(log_prob - log_prob.detach())
            kl = ((mean - base_mean) ** 2 / (2 * std**2)).mean()
            loss = loss + (-ADVANTAGES[row].double() * log_prob + WEIGHT * kl) / (len(ROWS) * 4)
            divergence += float(kl.detach()) / (len(ROWS) * 4)
    return loss, divergence


@pytest.mark.parametrize("micro", [3, 32])
def test_micro_batches_of_any_size_give_the_same_penalty(
    policy: Policy, rollouts: Rollouts, micro: int
) -> None:
    make_float64(policy)
    exact = as_float64(rollouts)
    config = penalised(policy.folder)
    loss, gradient = accumulated(policy, config, exact, exact.log_probs, 8)
    found_loss, found = accumulated(policy, config, exact, exact.log_probs, micro)
    assert found_loss == pytest.approx(loss, abs=1e-10)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)


def test_the_untrained_model_is_at_distance_0_and_its_first_update_the_plain_one(
    tiny_model: Path,
) -> None:
    states, measured = [], []
    for weight in (0.0, WEIGHT):
        config = penalised(tiny_model, weight=weight)
        policy = load_policy(config)
        drawn = rollouts_of(draw(policy, config))
        state, metrics = update(
            policy, initial_state(policy), drawn, as_credit(ADVANTAGES), {}, config
        )
        states.append(state)
        measured.append(metrics)
    assert measured[1]["kl_to_base"] == 0.0
    assert_same_tensors(states[1].weights, states[0].weights)
    assert "kl_to_base" not in measured[0]


@pytest.mark.slow
def test_a_heavier_penalty_keeps_the_policy_nearer_to_the_base_model(
    tiny_model: Path,
) -> None:
    distances = []
    for weight in (1e-9, 100.0):
        config = penalised(tiny_model, "ddpo_is", weight, learning_rate=3e-3)
        policy = load_policy(config)
        state = initial_state(policy)
        drawn = rollouts_of(draw(policy, config))
        for _ in range(3):
            state, metrics = update(policy, state, drawn, as_credit(ADVANTAGES), {}, config)
        distances.append(metrics["kl_to_base"])
    assert 0 < distances[1] < distances[0] / 2


def test_the_adapter_is_on_again_and_trainable_after_the_base_model_was_asked(
    policy: Policy,
) -> None:
    before = policy.weights.parameters().keys()
    latents = torch.ones(1, 4, 8, 8)
    time = torch.tensor([501.0])

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return policy.predict(latents, time, policy.encode(["a cat"]), 1.0)

    own = predicted()
    with policy.weights.use("base"):
        base = predicted()
    assert not torch.equal(base, own)
    assert torch.equal(predicted(), own)
    assert policy.weights.parameters().keys() == before != set()


def test_a_whole_unet_has_no_base_model_to_stay_near(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter; set `trainable: \{type: lora\}`, or kl_we"):
        tiny_config(tiny_model, trainable={"type": "full"}, algorithm={"kl_weight": 0.1})
    whole = load_policy(tiny_config(tiny_model, trainable={"type": "full"}))
    with (
        pytest.raises(ConfigError, match="no base model to compare with"),
        whole.weights.use("base"),
    ):
        pass
