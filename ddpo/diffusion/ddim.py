"""One denoising step seen as a Gaussian: its mean, its standard deviation, its log-density.

DDIM with eta (arXiv 2010.02502, formulas 12 and 16) is the policy of DDPO (arXiv 2305.13301,
section 4.2): p_theta(x_{t-1} | x_t, c) = Normal(mean, std² I). The order of operations is that of
diffusers' DDIMScheduler, so that plain diffusers draws the same pictures to the bit.

Shapes: B pairs of (sample, timestep), C latent channels, h x w latent pixels, T denoising steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from ddpo.errors import ModelError


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule of a model, cut to the steps of a sampler.

    Attributes:
        timesteps: [T] int64, from noisy to clean.
        alphas_cumprod: [N] float, the signal's share of variance at each training timestep.
        final_alpha_cumprod: Scalar float, the share after the last step.
        stride: Training timesteps between two denoising steps.
        prediction_type: What the model predicts: ``epsilon`` or ``v_prediction``.
        eta: Share of DDPM's noise that a step draws, in [0, 1].
        noisy: [W] int64, the only timesteps that draw noise; None where all do.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    stride: int
    prediction_type: str
    eta: float
    noisy: Tensor | None = None

    @classmethod
    def from_scheduler(cls, scheduler: DDIMScheduler, *, steps: int, eta: float) -> NoiseSchedule:
        """Read a diffusers scheduler.

        Args:
            scheduler: Its config says schedule, prediction type and spacing of the steps.
            steps: Denoising steps, T.
            eta: Share of DDPM's noise, in [0, 1].

        Returns:
            The schedule, on the CPU.

        Raises:
            ModelError: The scheduler clips its predictions, or predicts something else.
        """
        config: Any = scheduler.config
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the model's scheduler predicts {config.prediction_type!r}; "
                "expected 'epsilon' or 'v_prediction'"
            )
        if config.thresholding or config.clip_sample:
            raise ModelError(
                "the model's scheduler clips its predictions (clip_sample or thresholding), which "
                "makes a step no Gaussian of the model's output; latent models set both to false"
            )
        scheduler.set_timesteps(steps)
        return cls(
            timesteps=torch.as_tensor(scheduler.timesteps, dtype=torch.int64).cpu(),
            alphas_cumprod=scheduler.alphas_cumprod.cpu(),
            final_alpha_cumprod=torch.as_tensor(scheduler.final_alpha_cumprod).cpu(),
            stride=config.num_train_timesteps // steps,
            prediction_type=config.prediction_type,
            eta=eta,
        )

    def to(self, device: torch.device) -> NoiseSchedule:
        """Return the same schedule on a device."""
        return NoiseSchedule(
            self.timesteps.to(device),
            self.alphas_cumprod.to(device),
            self.final_alpha_cumprod.to(device),
            self.stride,
            self.prediction_type,
            self.eta,
            None if self.noisy is None else self.noisy.to(device),
        )

    def with_noise_only_at(self, steps: range) -> NoiseSchedule:
        """Return the same schedule, deterministic outside of some steps.

        Args:
            steps: The steps that draw noise, as indices into ``timesteps``.
        """
        return replace(self, noisy=self.timesteps[steps.start : steps.stop])

    def alphas(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signal's share of variance before and after a step.

        Args:
            timesteps: [B] int64.

        Returns:
            alpha_t and alpha_{t-1}, [B, 1, 1, 1] each.
        """
        previous = timesteps - self.stride
        alpha_t = self.alphas_cumprod[timesteps]
        alpha_previous = torch.where(
            previous >= 0, self.alphas_cumprod[previous.clamp(min=0)], self.final_alpha_cumprod
        )
        return alpha_t.view(-1, 1, 1, 1), alpha_previous.view(-1, 1, 1, 1)

    def stds(self, timesteps: Tensor) -> Tensor:
        """Return the standard deviation of each step, sigma_t of DDIM's formula 16.

        Args:
            timesteps: [B] int64.

        Returns:
            [B, 1, 1, 1]; 0 where a step is deterministic.
        """
        alpha_t, alpha_previous = self.alphas(timesteps)
        variance = (1 - alpha_previous) / (1 - alpha_t) * (1 - alpha_t / alpha_previous)
        std = self.eta * variance**0.5
        if self.noisy is None:
            return std
        return std.masked_fill(~torch.isin(timesteps, self.noisy).view(-1, 1, 1, 1), 0.0)

    def stochastic(self) -> Tensor:
        """Return [T] bool: the steps that draw noise. The others have no log-prob, no gradient."""
        return self.stds(self.timesteps).flatten() > 0


@dataclass(frozen=True)
class Transition:
    """Normal(mean, std² I), one a pair.

    Attributes:
        mean: [B, C, h, w].
        std: [B, 1, 1, 1].
    """

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Return x_{t-1} [B, C, h, w] for standard normal ``noise`` of the same shape."""
        return self.mean + self.std * noise

    def log_prob(self, next_latents: Tensor) -> Tensor:
        """Return the log-density of ``next_latents``, averaged over latent dimensions.

        Averaged, not summed, as every published implementation has it: the clip range of 1e-4 is
        made for it.

        Args:
            next_latents: [B, C, h, w], x_{t-1}.

        Returns:
            [B]; 0 where the step is deterministic.
        """
        deterministic = self.std == 0
        std = torch.where(deterministic, torch.ones_like(self.std), self.std)
        density = (
            -((next_latents.detach() - self.mean) ** 2) / (2 * std**2)
            - torch.log(std)
            - math.log(math.sqrt(2 * math.pi))
        )
        return density.mean(dim=(1, 2, 3)).masked_fill(deterministic.flatten(), 0.0)


def ddim_transition(
    schedule: NoiseSchedule, model_output: Tensor, latents: Tensor, timesteps: Tensor
) -> Transition:
    """Return the Gaussian of one DDIM step (arXiv 2010.02502, formula 12).

    Args:
        schedule: On the same device as the tensors.
        model_output: [B, C, h, w], after guidance.
        latents: [B, C, h, w], x_t.
        timesteps: [B] int64.

    Returns:
        The distribution of x_{t-1}.
    """
    alpha_t, alpha_previous = schedule.alphas(timesteps)
    beta_t = 1 - alpha_t
    if schedule.prediction_type == "epsilon":
        clean = (latents - beta_t**0.5 * model_output) / alpha_t**0.5
        epsilon = model_output
    else:
        clean = (alpha_t**0.5) * latents - (beta_t**0.5) * model_output
        epsilon = (alpha_t**0.5) * model_output + (beta_t**0.5) * latents
    std = schedule.stds(timesteps)
    direction = (1 - alpha_previous - std**2) ** 0.5 * epsilon
    return Transition(mean=alpha_previous**0.5 * clean + direction, std=std)
