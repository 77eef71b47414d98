"""What all processes on a rectified flow share: sigmas, noising, and Euler's step without noise.

x_sigma = (1 - sigma) x_0 + sigma eps, and the model predicts the velocity v = eps - x_0.

Shapes: B samples or (sample, step) pairs, T denoising steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import JsonValue
from torch import Tensor

from ddpo.basics.tensors import expand_like
from ddpo.config import FlowSampler
from ddpo.diffusion.base import Process, Transition
from ddpo.models.flow_schedule import FlowSchedule


class FlowProcess(Process):
    """A process from sigma 1 to 0; times are the model's, N sigma.

    Args:
        schedule: The model's.
        sampler: Steps and noise level.
        device: Where it computes.
        noisy: Steps that draw noise; all others are Euler's. All steps by default.

    Raises:
        ConfigError: There are more steps than training timesteps.
    """

    name: ClassVar[str]
    """As the sampler's `type`."""
    schedule_type = FlowSchedule
    initial_noise_scale = 1.0

    def __init__(
        self,
        schedule: FlowSchedule,
        sampler: FlowSampler,
        device: torch.device,
        noisy: range | None = None,
    ) -> None:
        self.schedule = schedule
        self.noise_level = sampler.noise
        self.time_scale = float(schedule.training_timesteps)
        sigmas = schedule.sigmas(sampler.steps)
        self.times = (sigmas[:-1] * schedule.training_timesteps).to(device)
        self.sigmas = sigmas.to(device)
        """[T+1] float32."""
        numbers = torch.arange(sampler.steps)
        drawn = torch.ones_like(numbers, dtype=torch.bool)
        if noisy is not None:
            drawn = (numbers >= noisy.start) & (numbers < noisy.stop)
        self._noisy = drawn.to(device) & (self.stds(numbers.to(device)) > 0)

    @abstractmethod
    def stds(self, steps: Tensor) -> Tensor:
        """Return the standard deviation of each step that draws noise, [B].

        Args:
            steps: [B] int64.
        """

    @abstractmethod
    def noisy_transition(self, steps: Tensor, velocity: Tensor, latents: Tensor) -> Transition:
        """Return the Gaussian of each pair's step, as if all drew noise.

        Args:
            steps: [B] int64.
            velocity: [B, ...].
            latents: [B, ...].
        """

    def around(self, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sigma before and after each step, [B, 1, ...] each.

        Args:
            steps: [B] int64.
            like: Gives the number of dimensions.
        """
        return expand_like(self.sigmas[steps], like), expand_like(self.sigmas[steps + 1], like)

    def stochastic(self) -> Tensor:
        """Return [T] bool: steps that draw noise."""
        return self._noisy

    def lengths(self, steps: Tensor, slopes: Tensor) -> Tensor:
        """Return the distance in sigma, -dt."""
        return self.sigmas[steps] - self.sigmas[steps + 1]

    def transition(self, steps: Tensor, output: Tensor, latents: Tensor) -> Transition:
        """Return the Gaussian of each pair's step; Euler's step where it draws no noise."""
        sigma, after = self.around(steps, latents)
        # The order of operations of diffusers' scheduler, for the same images to the bit.
        euler = latents + (after - sigma) * output
        draws = expand_like(self._noisy[steps], latents)
        if not draws.any():
            return Transition(euler, torch.zeros_like(sigma))
        step = self.noisy_transition(steps, output, latents)
        return Transition(
            mean=torch.where(draws, step.mean, euler),
            std=torch.where(draws, step.std, 0.0),
            divergence_scale=step.divergence_scale,
            normalized=step.normalized,
        )

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Mix clean latents with noise; the target is the velocity."""
        sigma = expand_like((times / self.time_scale).to(clean), clean)
        return (1 - sigma) * clean + sigma * noise, noise - clean

    def predicted_clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """Return x_sigma - sigma v."""
        return noisy - expand_like((times / self.time_scale).to(noisy), noisy) * prediction

    def training_time(self, generator: torch.Generator) -> Tensor:
        """Draw a logit-normal(0, 1) sigma and shift it (arXiv 2403.03206, sections 3.1 and 5.3)."""
        sigma = torch.randn((), generator=generator).sigmoid()
        shift = self.schedule.shift
        return self.time_scale * shift * sigma / (1 + (shift - 1) * sigma)

    def identity(self) -> Mapping[str, JsonValue]:
        """Return the model's schedule, the number of steps, and the noise level."""
        return {
            "type": self.name,
            "schedule": dict(self.schedule.settings),
            "from_one": self.schedule.from_one,
            "empirical_shift": self.schedule.empirical_shift,
            "tokens": self.schedule.tokens,
            "steps": self.steps,
            "noise_level": self.noise_level,
        }
