"""What Gaussian steps on a rectified flow share: sigmas, and Euler's step without noise.

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
from ddpo.diffusion.base import MarkovProcess, Transition
from ddpo.models.flow_schedule import FlowSchedule


class FlowProcess(MarkovProcess):
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

    def __init__(
        self,
        schedule: FlowSchedule,
        sampler: FlowSampler,
        device: torch.device,
        noisy: range | None = None,
    ) -> None:
        self.schedule = schedule
        self.noise_level = sampler.noise
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

    def identity(self) -> Mapping[str, JsonValue]:
        """Return the model's schedule, the number of steps, and the noise level."""
        return {
            "type": self.name,
            **self.schedule.identity,
            "steps": self.steps,
            "noise_level": self.noise_level,
        }
