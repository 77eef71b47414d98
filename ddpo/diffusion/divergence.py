"""How far a policy has moved from its base model: the KL divergence of each denoising step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpo.algorithms.kl import gaussian_kl
from ddpo.config import SamplerConfig
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import markov_process_of
from ddpo.models import Policy


@torch.no_grad()
def kl_to_base(
    policy: Policy, prompts: Sequence[str], seeds: Sequence[int], sampler: SamplerConfig
) -> Tensor:
    """Estimate the KL divergence of each step from the base model's, on the policy's own samples.

    Guidance is part of both. Averaged over latent dimensions, as log-probs are.

    Args:
        policy: It can compute with its base model's weights.
        prompts: B prompts.
        seeds: B noise seeds.
        sampler: With noise; a window's position is a number.

    Returns:
        [T] on the CPU, means over the samples; NaN where a step is deterministic.

    Raises:
        ConfigError: The base model's weights are gone.
    """
    process = markov_process_of(policy, sampler)
    latents = sample(policy, prompts, seeds, sampler).latents.to(policy.device)
    result = torch.full((process.steps,), torch.nan)
    for number in process.stochastic().nonzero().flatten().tolist():
        steps = torch.full((len(prompts),), number, device=policy.device)
        before = latents[:, number]
        means = []
        for weights in ("trained", "base"):
            with policy.weights.use(weights):
                times = process.times[steps]
                conditioning = policy.encode(prompts)  # by text encoders that may be trained too
                output = policy.predict(before, times, conditioning, sampler.guidance_scale)
                means.append(process.transition(steps, output, before))
        current, base = means
        result[number] = gaussian_kl(current.mean, base.mean, current.divergence_std).mean().cpu()
    return result
