"""Prompts and seeds to trajectories: the sampling phase of DDPO (arXiv 2305.13301, algorithm 1).

Shapes: B samples, T denoising steps, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ddpo.basics.digests import json_digest
from ddpo.basics.randomness import generator
from ddpo.config import SamplerConfig
from ddpo.diffusion.base import Process
from ddpo.diffusion.shared_rows import SharedRows, shared_starts
from ddpo.diffusion.window import process_of, whole_process
from ddpo.errors import NonFiniteError
from ddpo.models import Policy


@dataclass(frozen=True)
class Trajectories:
    """Denoising trajectories, with all that an update needs, and the images they end in."""

    latents: Tensor
    """[B, T+1, C, h, w] float32 from noise to clean, as log-probs were computed on."""
    log_probs: Tensor
    """[B, T] float32, averaged over latent dimensions; 0 where a step is deterministic."""
    times: Tensor
    """[T] float32, from noisy to clean."""
    images: list[Image.Image]
    """B RGB images."""

    def log_prob_mean(self, row: int) -> float | None:
        """Return a sample's mean log-prob over its steps; None if every step is deterministic."""
        log_probs = self.log_probs[row]
        return float(log_probs.mean()) if log_probs.any() else None


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    *,
    starts: Sequence[int] | None = None,
    updates: int | None = None,
    on_images: Callable[[int], None] = lambda count: None,
) -> Trajectories:
    """Sample trajectories from the policy as it is now.

    Args:
        policy: Its numerics say how many images share a forward.
        prompts: B prompts.
        seeds: B noise seeds; a sample's noise depends on its own seed alone. The first C·h·w normal
            numbers of a seed's generator are the starting latents.
        sampler: Process and guidance; if noise is drawn in a window only, as
            :func:`~ddpo.diffusion.window.sampler_of_epoch` resolved it.
        starts: B seeds of the starting latents, where these are not of the samples' own seeds. The
            noise of the steps is the same with and without them. Neighbours with equal prompts and
            starts are predicted once until a step draws noise.
        updates: Optimizer steps behind the policy's weights, for the error's message; None if
            unknown.
        on_images: Called with the number of images that were just finished.

    Returns:
        Trajectories on the CPU.

    Raises:
        NonFiniteError: A log-prob or latent is NaN or infinite.
    """
    process = process_of(policy, sampler)
    policy.prepare_prompts(prompts)
    size = policy.numerics.sample_batch_size
    batches: list[Trajectories] = []
    latents = torch.empty(0)
    for start in range(0, len(prompts), size):
        batch = slice(start, start + size)
        drawn = _sample_batch(
            policy,
            prompts[batch],
            seeds[batch],
            starts and starts[batch],
            process,
            sampler.guidance_scale,
        )
        _check_finite(drawn, prompts[batch], policy, updates)
        if start == 0:  # once for all: joining them at the end would take the room twice
            latents = drawn.latents.new_empty(len(prompts), *drawn.latents.shape[1:])
        latents[batch] = drawn.latents
        batches.append(replace(drawn, latents=latents[batch]))
        on_images(len(batches[-1].images))
    return Trajectories(
        latents=latents,
        log_probs=torch.cat([b.log_probs for b in batches]),
        times=batches[0].times,
        images=[image for b in batches for image in b.images],
    )


def sampler_digest(policy: Policy, sampler: SamplerConfig) -> str:
    """Return ``sampler_digest``, the identity of a sampler on a model.

    Args:
        policy: Gives the noise schedule, image size and dtype.
        sampler: Process, guidance, and the window if noise is drawn in it only: as the config has
            it, since run seed and epoch decide its position.

    Returns:
        sha256, hexadecimal.
    """
    window = sampler.window
    noisy = {} if window is None or not window.noise_only_there else {"noise": window.model_dump()}
    width, height = policy.size
    return json_digest(
        {
            "process": whole_process(policy, sampler).identity(),
            "guidance_scale": sampler.guidance_scale,
            "resolution": width if width == height else [width, height],
            "dtype": policy.numerics.dtype,
            **noisy,
        }
    )


def _sample_batch(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    starts: Sequence[int] | None,
    process: Process,
    guidance_scale: float,
) -> Trajectories:
    generators = [generator(seed) for seed in seeds]
    conditioning = policy.encode(prompts)
    start = _noise(policy, generators)
    if starts:
        start = _noise(policy, [generator(seed) for seed in starts])
    latents = [start * process.initial_noise_scale]
    log_probs: list[Tensor] = []
    stochastic = process.stochastic().tolist()
    draws_noise = any(stochastic)
    step = process.stepper()
    every = SharedRows([1] * len(prompts))
    rows = shared_starts(prompts, starts) if starts else every
    for number in range(process.steps):
        times = process.times[number].expand(len(prompts))
        output = rows.predict(policy, latents[-1], times, conditioning, guidance_scale)
        rows = every if stochastic[number] else rows
        # A step's noise is the same whichever other steps draw any; plain diffusers draws none for
        # a process without noise.
        noise = _noise(policy, generators) if draws_noise else torch.zeros_like(latents[-1])
        after, log_prob = step(number, output, latents[-1], noise)
        latents.append(after)
        log_probs.append(log_prob)
    return Trajectories(
        latents=torch.stack(latents, dim=1).cpu(),
        log_probs=torch.stack(log_probs, dim=1).cpu(),
        times=process.times.cpu(),
        images=policy.decode(latents[-1]),
    )


def _noise(policy: Policy, generators: Sequence[torch.Generator]) -> Tensor:
    shape = policy.latent_shape
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(policy.device)


def _check_finite(
    result: Trajectories, prompts: Sequence[str], policy: Policy, updates: int | None
) -> None:
    latents = torch.isfinite(result.latents[:, 1:]).flatten(2).all(dim=-1)
    bad = ~(torch.isfinite(result.log_probs) & latents)
    if bad.any():
        row, step = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"sampling produced a non-finite latent or log-prob for prompt {prompts[row]!r} at "
            f"step {step} (time {float(result.times[step]):g}); nothing was stored. "
            f"{_cause(policy, updates)}"
        )


def _cause(policy: Policy, updates: int | None) -> str:
    """Say what made a sample non-finite, and the way out."""
    if updates != 0:
        return f"The weights have diverged. {policy.numerics.advice}"
    advice = (
        "Start a new run with numerics.dtype bfloat16 or float32"
        if policy.numerics.dtype == "float16"
        else "Check that plain diffusers samples from it, and lower sampler.guidance_scale"
    )
    return (
        "Nothing has been trained yet (checkpoint 0), so this is the base model in "
        f"{policy.folder}, computed in {policy.numerics.dtype}. {advice}"
    )
