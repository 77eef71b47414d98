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
from ddpo.diffusion.base import Process, Transition
from ddpo.errors import ConfigError, ModelError
from ddpo.models.schedule import NoiseSchedule


class Ddim(Process):
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
    initial_noise_scale = 1.0

    def __init__(
        self,
        schedule: NoiseSchedule,
        sampler: DdimSampler,
        device: torch.device,
        noisy: range | None = None,
    ) -> None:
        self.schedule = schedule
        self.eta = sampler.eta
        self.time_scale = float(schedule.training_timesteps)
        timesteps = spaced_timesteps(schedule, sampler.steps)
        previous = timesteps - schedule.training_timesteps // sampler.steps
        alphas = schedule.alphas_cumprod
        self.times = timesteps.float().to(device)
        self._alphas = alphas[timesteps].to(device)
        if schedule.prediction_type == "epsilon" and not self._alphas.all():
            raise ModelError(
                f"the model predicts noise, and at timestep {int(timesteps[0])} its input is "
                "pure noise (rescale_betas_zero_snr), which determines no image. Expected a model "
                "that predicts v; or set timestep_spacing to 'leading' in the model's "
                "scheduler_config.json, which leaves that timestep out"
            )
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
        clean = self._clean(alpha, latents, output)
        if self.schedule.prediction_type == "epsilon":
            epsilon = output
        else:
            epsilon = (alpha**0.5) * output + ((1 - alpha) ** 0.5) * latents
        std = expand_like(self.stds(steps), latents)
        # Rounding can make it negative where the input is pure noise (zero terminal SNR).
        direction = (1 - alpha_after - std**2).clamp(min=0) ** 0.5 * epsilon
        return Transition(mean=alpha_after**0.5 * clean + direction, std=std)

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Noise clean latents; the target is epsilon or v (arXiv 2202.00512)."""
        alpha = self._alpha_at(times, clean)
        signal, spread = alpha**0.5, (1 - alpha) ** 0.5
        noisy = signal * clean + spread * noise
        if self.schedule.prediction_type == "epsilon":
            return noisy, noise
        return noisy, signal * noise - spread * clean

    def predicted_clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """Return x_0 by the formula of what the model predicts, epsilon or v."""
        return self._clean(self._alpha_at(times, noisy), noisy, prediction)

    def _clean(self, alpha: Tensor, latents: Tensor, output: Tensor) -> Tensor:
        """Return the clean latents that a prediction at signal share ``alpha`` implies."""
        beta = 1 - alpha
        if self.schedule.prediction_type == "epsilon":
            return (latents - beta**0.5 * output) / alpha**0.5
        return (alpha**0.5) * latents - (beta**0.5) * output

    def _alpha_at(self, times: Tensor, like: Tensor) -> Tensor:
        """Return the signal's share of variance at some times, in the shape [B, 1, ...]."""
        alphas = self.schedule.alphas_cumprod.to(like.device, like.dtype)
        return expand_like(alphas[times.long()], like)

    def training_time(self, generator: torch.Generator) -> Tensor:
        """Draw a training timestep, all with equal chance."""
        return torch.randint(self.schedule.training_timesteps, (), generator=generator).float()

    def identity(self) -> Mapping[str, JsonValue]:
        """Return the model's noise schedule, the number of steps, and eta."""
        return {
            "type": "ddim",
            "schedule": dict(self.schedule.settings),
            "steps": self.steps,
            "eta": self.eta,
        }


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
