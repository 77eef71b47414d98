"""Prompts and seeds to trajectories: the sampling round of DDPO (arXiv 2305.13301, algorithm 1).

Shapes: B samples, T denoising steps, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ddpo.basics.digests import json_digest
from ddpo.basics.randomness import generator
from ddpo.config import SamplerConfig
from ddpo.diffusion.ddim import NoiseSchedule, ddim_transition
from ddpo.diffusion.window import noise_schedule
from ddpo.errors import NonFiniteError
from ddpo.models import Policy


@dataclass(frozen=True)
class Trajectories:
    """Denoising trajectories, all that an update needs, and the pictures they end in.

    Attributes:
        latents: [B, T+1, C, h, w] float32 from noise to clean, as log-probs were computed on.
        log_probs: [B, T] float32, averaged over latent dimensions; 0 where a step is deterministic.
        timesteps: [T] int64, from noisy to clean.
        images: B RGB pictures.
    """

    latents: Tensor
    log_probs: Tensor
    timesteps: Tensor
    images: list[Image.Image]

    def log_prob_mean(self, row: int) -> float | None:
        """Return the mean log-prob of a sample's steps, None where every step is deterministic."""
        own = self.log_probs[row]
        return float(own.mean()) if own.any() else None


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    *,
    on_pictures: Callable[[int], None] = lambda count: None,
) -> Trajectories:
    """Draw trajectories from the policy as it is now.

    Args:
        policy: Its numerics say how many pictures share a forward.
        prompts: B texts.
        seeds: B noise seeds: what a sample draws depends on its own alone. The first C·h·w normal
            numbers of a seed's generator are the starting latents.
        sampler: Steps, eta, guidance; a window that noise is drawn in has its place settled.
        on_pictures: Called with the number of pictures that just got ready.

    Returns:
        Trajectories on the CPU.

    Raises:
        NonFiniteError: A log-prob or latent is NaN or infinite.
    """
    schedule = noise_schedule(policy, sampler)
    size = policy.numerics.sample_batch_size
    batches: list[Trajectories] = []
    for start in range(0, len(prompts), size):
        batch = slice(start, start + size)
        batches.append(_sample_batch(policy, prompts[batch], seeds[batch], sampler, schedule))
        on_pictures(len(batches[-1].images))
    return Trajectories(
        latents=torch.cat([b.latents for b in batches]),
        log_probs=torch.cat([b.log_probs for b in batches]),
        timesteps=batches[0].timesteps,
        images=[image for b in batches for image in b.images],
    )


def sampler_digest(policy: Policy, sampler: SamplerConfig) -> str:
    """Return ``sampler_digest``: what makes two samplers the same.

    Args:
        policy: Gives the scheduler's config, resolution and dtype.
        sampler: Steps, eta, guidance, and the window where noise is drawn in it only: as the
            config has it, since run seed and epoch settle its place.

    Returns:
        sha256, hexadecimal.
    """
    window = sampler.window
    noisy = {} if window is None or not window.noise_only_there else {"noise": window.model_dump()}
    scheduler = {
        name: value
        for name, value in policy.pipeline.scheduler.config.items()
        if not name.startswith("_") and isinstance(value, str | int | float | bool | None)
    }
    return json_digest(
        {
            "scheduler": scheduler,
            "steps": sampler.steps,
            "eta": sampler.eta,
            "guidance_scale": sampler.guidance_scale,
            "resolution": policy.resolution,
            "dtype": policy.numerics.dtype,
            **noisy,
        }
    )


def _sample_batch(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    schedule: NoiseSchedule,
) -> Trajectories:
    generators = [generator(seed) for seed in seeds]
    embeddings = policy.embed(prompts)
    latents = [_noise(policy, generators) * policy.pipeline.scheduler.init_noise_sigma]
    log_probs: list[Tensor] = []
    for timestep in schedule.timesteps:
        timesteps = timestep.expand(len(prompts))
        output = policy.predict(latents[-1], timesteps, embeddings, sampler.guidance_scale)
        transition = ddim_transition(schedule, output, latents[-1], timesteps)
        # Without eta plain diffusers draws no noise either.
        noise = _noise(policy, generators) if sampler.eta > 0 else torch.zeros_like(latents[-1])
        latents.append(transition.draw(noise))
        log_probs.append(transition.log_prob(latents[-1]))
    result = Trajectories(
        latents=torch.stack(latents, dim=1).cpu(),
        log_probs=torch.stack(log_probs, dim=1).cpu(),
        timesteps=schedule.timesteps.cpu(),
        images=policy.decode(latents[-1]),
    )
    _check_finite(result, prompts)
    return result


def _noise(policy: Policy, generators: Sequence[torch.Generator]) -> Tensor:
    shape = policy.latent_shape
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(policy.device)


def _check_finite(result: Trajectories, prompts: Sequence[str]) -> None:
    bad = ~(torch.isfinite(result.log_probs) & torch.isfinite(result.latents[:, 1:]).all((2, 3, 4)))
    if bad.any():
        sample_index, step = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"sampling gave a non-finite latent or log-prob for prompt {prompts[sample_index]!r} "
            f"at timestep {int(result.timesteps[step])} (step {step}); nothing was stored. The "
            "weights have diverged: go back to an earlier checkpoint with a lower learning rate, "
            "or use numerics.dtype float32 or bfloat16."
        )
