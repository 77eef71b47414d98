"""DDIM with eta (arXiv 2010.02502, formulas 12 and 16), the policy of DDPO (arXiv 2305.13301, 4.2).

p_theta(x_{t-1} | x_t, c) = Normal(mean, std² I). The order of operations is that of diffusers'
DDIMScheduler, so that plain diffusers draws the same images to the bit.

Shapes: B samples or (sample, step) pairs, T denoising steps, N training timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from ddpo.basics.tensors import expand_like
from ddpo.config import DdimSampler
from ddpo.diffusion.base import MarkovProcess, PlainScheduler, Transition
from ddpo.errors import ConfigError
from ddpo.models.schedule import NoiseSchedule


class Ddim(MarkovProcess):
    """DDIM with noise; times are the model's training timesteps.

    Args:
        schedule: The model's.
        sampler: Steps and eta.
        device: Where it computes.
        noisy: Steps that draw noise; all others are deterministic. All steps by default.

    Raises:
        ConfigError: The model has fewer training timesteps than the sampler has steps.
        ModelError: The model predicts noise at a step whose input is pure noise.
    """

    schedule_type = NoiseSchedule

    def __init__(
        self,
        schedule: NoiseSchedule,
        sampler: DdimSampler,
        device: torch.device,
        noisy: range | None = None,
    ) -> None:
        self.schedule = schedule
        self.eta = sampler.eta
        timesteps = spaced_timesteps(schedule, sampler.steps)
        previous = timesteps - schedule.training_timesteps // sampler.steps
        alphas = schedule.alphas_cumprod
        self.times = timesteps.float().to(device)
        self._alphas = alphas[timesteps].to(device)
        schedule.check_times(timesteps)
        self._alphas_after = torch.where(
            previous >= 0, alphas[previous.clamp(min=0)], schedule.final_alpha_cumprod
        ).to(device)
        self._noisy = torch.ones(sampler.steps, dtype=torch.bool, device=device)
        if noisy is not None:
            self._noisy[: noisy.start] = False
            self._noisy[noisy.stop :] = False

    def alphas(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signal's share of variance before and after a step, [B] each.

        Args:
            steps: [B] int64.
        """
        return self._alphas[steps], self._alphas_after[steps]

    def stds(self, steps: Tensor) -> Tensor:
        """Return the standard deviation of each step, sigma_t of formula 16.

        Args:
            steps: [B] int64.

        Returns:
            [B]; 0 where a step is deterministic.
        """
        alpha, alpha_after = self.alphas(steps)
        variance = (1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)
        return (self.eta * variance**0.5).masked_fill(~self._noisy[steps], 0.0)

    def stochastic(self) -> Tensor:
        """Return [T] bool: steps that draw noise."""
        return self.stds(torch.arange(self.steps, device=self.times.device)) > 0

    def transition(self, steps: Tensor, output: Tensor, latents: Tensor) -> Transition:
        """Return the Gaussian of each pair's step (formula 12)."""
        alpha, alpha_after = (expand_like(value, latents) for value in self.alphas(steps))
        clean = self.schedule.clean_of(alpha, latents, output)
        if self.schedule.prediction_type == "epsilon":
            epsilon = output
        else:
            epsilon = (alpha**0.5) * output + ((1 - alpha) ** 0.5) * latents
        std = expand_like(self.stds(steps), latents)
        # Rounding can make it negative where the input is pure noise (zero terminal SNR).
        direction = (1 - alpha_after - std**2).clamp(min=0) ** 0.5 * epsilon
        return Transition(mean=alpha_after**0.5 * clean + direction, std=std)

    def identity(self) -> Mapping[str, JsonValue]:
        """Return the model's noise schedule, the number of steps, and eta."""
        return {
            "type": "ddim",
            **self.schedule.identity,
            "steps": self.steps,
            "eta": self.eta,
        }

    @property
    def plain_scheduler(self) -> PlainScheduler:
        """DDIM, which clips by default."""
        return PlainScheduler("DDIMScheduler", {"clip_sample": False})


def spaced_timesteps(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Place denoising steps on the training timesteps as diffusers' DDIM does.

    Args:
        schedule: Gives N, the spacing and its offset.
        steps: T.

    Returns:
        [T] int64, from noisy to clean.

    Raises:
        ConfigError: N is too small for so many steps.
    """
    count = schedule.training_timesteps
    if steps > count:
        raise _too_many(schedule, steps)
    if schedule.spacing == "linspace":
        timesteps = np.linspace(0, count - 1, steps).round()[::-1]
    elif schedule.spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (count // steps) + schedule.steps_offset
    else:
        timesteps = np.round(np.arange(count, 0, -count / steps)) - 1
    if timesteps[0] >= count:
        raise _too_many(schedule, steps)
    return torch.from_numpy(timesteps.astype(np.int64))


def _too_many(schedule: NoiseSchedule, steps: int) -> ConfigError:
    count = schedule.training_timesteps
    largest = count - (schedule.steps_offset if schedule.spacing == "leading" else 0)
    return ConfigError(
        f"sampler.steps is {steps}, more than the model's {count} training timesteps allow; "
        f"set it to at most {largest}"
    )
