"""Checks of the mathematics that several tests share, and that planted bugs must turn red.

Each goes through the library's public functions and compares with something computed another way.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from torch import Tensor

from ddpo.algorithms import Rwr
from ddpo.algorithms.advantages import PerPromptAdvantages
from ddpo.algorithms.base import PromptStatistics
from ddpo.config import DdimSampler, RunConfig
from ddpo.diffusion.ddim import Ddim
from ddpo.diffusion.sampling import sample
from ddpo.models import Policy
from ddpo.models.schedule import NoiseSchedule
from ddpo.training.denoising import DenoisingGradient
from ddpo.training.loop import initial_state, update
from ddpo.training.noising import Noising
from ddpo.training.samples import FinalLatents, Rollouts
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.scored import compute_advantages, compute_weights
from tests.tiny import alternating_advantages, as_credit, ddim_on, flat

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class GoldenStep:
    key: str
    timestep: int
    steps: int
    latents: Tensor
    model_output: Tensor
    next_latents: Tensor
    log_prob: Tensor


def golden_steps() -> list[GoldenStep]:
    with safe_open(GOLDEN / "ddim_transitions.safetensors", "pt") as file:
        return [
            GoldenStep(
                case["key"],
                case["timestep"],
                case["steps"],
                *(
                    file.get_tensor(f"{case['key']}.{name}")
                    for name in ("latents", "model_output", "next_latents", "log_prob")
                ),
            )
            for case in json.loads(file.metadata()["cases"])
        ]


def stable_diffusion_scheduler(**changes: object) -> DDIMScheduler:
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**settings, **changes})


def ddim(scheduler: DDIMScheduler, *, steps: int, eta: float = 1.0) -> Ddim:
    schedule = NoiseSchedule.from_scheduler(scheduler.config)
    return Ddim(schedule, DdimSampler(steps=steps, eta=eta), torch.device("cpu"))


def check_log_probs_are_golden() -> None:
    for step in golden_steps():
        process = ddim(stable_diffusion_scheduler(), steps=step.steps)
        steps = torch.full((3,), process.times.tolist().index(step.timestep))
        found = process.transition(steps, step.model_output, step.latents)
        difference = (found.log_prob(step.next_latents) - step.log_prob).abs().max()
        assert difference < 1e-5, f"{step.key}: log-prob off by {difference}"


def check_advantages_are_golden() -> None:
    golden = json.loads((GOLDEN / "prompt_statistics.json").read_text())
    config = PerPromptAdvantages(
        buffer_size=golden["buffer_size"], min_count=golden["min_count"], clip=1e9
    )
    statistics: PromptStatistics = {}
    assert len(golden["epochs"]) == 6
    for epoch in golden["epochs"]:
        batch = compute_advantages(
            config, statistics, epoch["prompts"], np.asarray(epoch["rewards"])
        )
        difference = np.abs(batch.advantages - np.asarray(epoch["advantages"])).max()
        assert difference < 1e-5, f"advantages off by {difference}"
        statistics = batch.statistics


def check_initial_ratio_is_one(policy: Policy, config: RunConfig) -> None:
    """The update sees the sampler's own batches, so not one bit may differ."""
    count = config.rollouts.samples_per_epoch
    prompts = [("a cat", "a dog", "a horse")[i % 3] for i in range(count)]
    drawn = sample(policy, prompts, list(range(count)), config.sampler)
    rollouts = Rollouts(prompts, drawn.latents, drawn.log_probs)
    advantages = torch.linspace(-2, 2, count)
    _, metrics = update(policy, initial_state(policy), rollouts, as_credit(advantages), {}, config)
    deviations = metrics["initial_ratio_deviation_by_timestep"]
    assert len(deviations) == config.sampler.steps
    worst = metrics["initial_ratio_deviation"]["max"]
    assert worst == 0.0, f"initial ratio off by {worst}"
    assert all(deviation["max"] == 0.0 for deviation in deviations.values())


def check_gradient_is_each_samples_own(
    policy: Policy, config: RunConfig, rollouts: Rollouts, advantages: Tensor
) -> None:
    """Compare one update's gradient with one forward a pair and formulas written out here.

    Args:
        policy: Computes in float64.
        config: DDPO-IS; at a ratio of 1 its gradient is the mean of -A times that of the log-prob.
        rollouts: In float64, drawn by the policy.
        advantages: One a sample, no two alike.
    """
    gradient = TrajectoryGradient(policy, config.sampler, config.algorithm)
    count, steps = rollouts.log_probs.shape
    old = gradient.recompute(rollouts, range(count))
    gradient.accumulate(rollouts, advantages, range(count), old)
    found = take_gradients(policy)

    scheduler = policy.pipeline.scheduler
    scheduler.set_timesteps(steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    assert len(timesteps) == steps
    unet, guidance = policy.pipeline.unet, config.sampler.guidance_scale
    empty = policy.pipeline.encode_prompt("", policy.device, 1, False)[0]
    loss = torch.zeros((), dtype=torch.float64)
    for row, prompt in enumerate(rollouts.prompts):
        text = policy.pipeline.encode_prompt(prompt, policy.device, 1, False)[0]
        for step, timestep in enumerate(timesteps):
            latents = rollouts.latents[row : row + 1, step]
            without = unet(latents, timestep, empty).sample
            output = without + guidance * (unet(latents, timestep, text).sample - without)
            mean, std = ddim_reference(
                scheduler.alphas_cumprod.double(),
                timestep,
                timestep - 1000 // steps,
                latents,
                output,
                eta=config.sampler.eta,
                prediction_type=scheduler.config.prediction_type,
                final_alpha=float(scheduler.final_alpha_cumprod),
            )
            density = torch.distributions.Normal(mean, std)
            log_prob = density.log_prob(rollouts.latents[row : row + 1, step + 1]).mean()
            loss = loss - float(advantages[row]) * log_prob / (count * steps)
    loss.backward()
    expected = take_gradients(policy)
    assert expected.keys() == found.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-4, "the gradient vanishes: this check could not fail"
    # float32 alphas in the library against float64 ones here.
    for name, value in expected.items():
        difference = float((found[name] - value).abs().max()) / largest
        assert difference < 1e-5, f"{name}: gradient off by {difference} of the largest"


def take_gradients(policy: Policy) -> dict[str, Tensor]:
    """Return a copy of the gradients that are there, and clear them."""
    gradients = {}
    for name, parameter in policy.weights.parameters().items():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
        parameter.grad = None
    return gradients


def ddim_reference(
    alphas_cumprod: Tensor,
    timestep: int,
    previous: int,
    latents: Tensor,
    model_output: Tensor,
    *,
    eta: float,
    prediction_type: str,
    final_alpha: float,
) -> tuple[Tensor, float]:
    """Mean and standard deviation of one DDIM step (arXiv 2010.02502, formulas 12 and 16)."""
    alpha = float(alphas_cumprod[timestep])
    alpha_prev = float(alphas_cumprod[previous]) if previous >= 0 else final_alpha
    if prediction_type == "epsilon":
        noise = model_output
        clean = (latents - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    else:  # v = sqrt(alpha) noise - sqrt(1 - alpha) clean (arXiv 2202.00512)
        clean = alpha**0.5 * latents - (1 - alpha) ** 0.5 * model_output
        noise = (latents - alpha**0.5 * clean) / (1 - alpha) ** 0.5
    std = eta * ((1 - alpha_prev) / (1 - alpha)) ** 0.5 * (1 - alpha / alpha_prev) ** 0.5
    mean = alpha_prev**0.5 * clean + (1 - alpha_prev - std**2) ** 0.5 * noise
    return mean, std


def accumulated(
    policy: Policy, config: RunConfig, rollouts: Rollouts, old: Tensor, micro: int
) -> tuple[float, Tensor]:
    """Return the loss of eight alternating advantages and its gradient, all parameters in one."""
    policy.numerics = policy.numerics.model_copy(update={"micro_batch_size": micro})
    gradient = TrajectoryGradient(policy, config.sampler, config.algorithm)
    done = gradient.accumulate(rollouts, alternating_advantages(8), range(8), old)
    return done.loss, flat(take_gradients(policy))


def check_weights_are_a_softmax() -> None:
    """Compare RWR's weights with decimals of 40 digits, over the data set and by prompt."""
    prompts = ["a", "b", "a", "b", "a"]
    rewards = ["0.5", "-3.25", "7.125", "2", "6.875"]
    with localcontext(prec=40):
        powers = [(Decimal("0.2") * Decimal(reward)).exp() for reward in rewards]
        for weights_over in ("data_set", "prompt"):
            shared = [
                [p for p, other in zip(powers, prompts, strict=True) if other == own]
                if weights_over == "prompt"
                else powers
                for own in prompts
            ]
            expected = [
                float(len(others) * p / sum(others))
                for p, others in zip(powers, shared, strict=True)
            ]
            found = compute_weights(
                Rwr(type="rwr", beta=0.2, weights_over=weights_over),
                prompts,
                np.asarray(rewards, dtype=np.float64),
            )
            difference = np.abs(found.weights - expected).max()
            assert difference < 1e-14, f"weights over the {weights_over} off by {difference}"


def check_regression_is_each_samples_own(
    policy: Policy, finals: FinalLatents, weights: Tensor, noising: Noising
) -> None:
    """Compare the gradient of one step with one forward a sample and formulas written out here.

    Args:
        policy: Computes in float64.
        finals: In float64.
        weights: One a sample, no two alike.
        noising: Of all samples.
    """
    count = len(finals.prompts)
    gradient = DenoisingGradient(policy, ddim_on(policy), Rwr(type="rwr"))
    found_loss = gradient.accumulate(finals, {"weight": weights}, range(count), noising)
    found = take_gradients(policy)

    scheduler = policy.pipeline.scheduler
    loss = torch.zeros((), dtype=torch.float64)
    for row, prompt in enumerate(finals.prompts):
        text = policy.pipeline.encode_prompt(prompt, policy.device, 1, False)[0]
        timestep = int(noising.times[row])
        alpha = math.prod(1 - float(beta) for beta in scheduler.betas[: timestep + 1])
        clean, noise = finals.latents[row : row + 1], noising.noise[row : row + 1].double()
        noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
        target = noise
        if scheduler.config.prediction_type == "v_prediction":  # arXiv 2202.00512
            target = alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
        error = policy.pipeline.unet(noisy, timestep, text).sample - target
        loss = loss + float(weights[row]) * (error**2).sum() / error.numel() / count
    loss.backward()
    expected = take_gradients(policy)
    assert expected.keys() == found.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-4, "the gradient vanishes: this check could not fail"
    # float32 alphas in the scheduler against float64 ones here.
    for name, value in expected.items():
        difference = float((found[name] - value).abs().max()) / largest
        assert difference < 1e-5, f"{name}: gradient off by {difference} of the largest"
    assert abs(found_loss / float(loss.detach()) - 1) < 1e-5, f"loss off by {found_loss - loss}"
