"""What a denoising process needs to know of a model: how it was trained, free of any pipeline.

Shapes: B samples; [B, ...] are latents of any rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import JsonValue
from torch import Tensor

from ddpo.basics.tensors import expand_like
from ddpo.errors import ModelError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]

_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)
"""What a schedule is made from. A scheduler's file has more, for other processes than ours."""


class Schedule(ABC):
    """How a model's training mixed images with noise."""

    kind: ClassVar[str]
    """What such a model is called, for messages."""

    patch: int
    """Latent pixels along one side of what the network takes together."""
    scheduler: Mapping[str, Any]
    """The config of the model's own scheduler in diffusers."""

    @property
    @abstractmethod
    def training_timesteps(self) -> int:
        """N, the number of timesteps that the model was trained with."""

    @property
    def time_scale(self) -> float:
        """The end of the model's time axis: times lie in [0, N)."""
        return float(self.training_timesteps)

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, JsonValue]:
        """What the schedule was made from, for digests, as plain JSON."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Noise clean latents as in the model's training.

        Args:
            clean: [B, ...], x_0.
            noise: [B, ...], standard normal.
            times: [B] float32, as :meth:`training_time` draws them.

        Returns:
            x_t, and what the model should predict from it; [B, ...] each.
        """

    @abstractmethod
    def predicted_clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """Return the clean latents that a prediction implies, linear in the prediction.

        Args:
            noisy: [B, ...], x_t.
            prediction: [B, ...], of the model at these times.
            times: [B] float32, on the model's axis.

        Returns:
            [B, ...]; x_0 itself for the target of :meth:`noised`.
        """

    @abstractmethod
    def training_time(self, generator: torch.Generator) -> Tensor:
        """Draw one time from the distribution that the model was trained with, a float32 scalar."""

    @abstractmethod
    def solver_settings(self) -> dict[str, JsonValue]:
        """Return what diffusers' multistep solvers take to run on the schedule.

        Beside the config of the model's own scheduler.

        Raises:
            ConfigError: That has a setting which they do not have.
        """

    @abstractmethod
    def solver_times(self, steps: int) -> dict[str, float]:
        """Return what their ``set_timesteps`` takes beside the number of steps.

        Args:
            steps: T.
        """

    @abstractmethod
    def check_times(self, times: Tensor) -> None:
        """Check that a sampler may ask the model for its prediction at some times.

        Args:
            times: [T], from noisy to clean.

        Raises:
            ModelError: The prediction at one of them determines no image.
        """

    def at(self, latent_shape: Sequence[int]) -> Self:
        """Return the schedule for images of another size, on which it may depend.

        Args:
            latent_shape: Shape of one image's latents, [C, h, w].
        """
        del latent_shape
        return self


@dataclass(frozen=True)
class NoiseSchedule(Schedule):
    """The variance-preserving diffusion that a model was trained to undo.

    x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps at training timesteps t = 0 ... N - 1.
    """

    kind = "diffusion model"
    patch = 1

    scheduler: Mapping[str, Any]
    """The config of the model's own scheduler in diffusers."""
    alphas_cumprod: Tensor
    """[N] float32 on the CPU: alpha_t, the signal's share of variance."""
    final_alpha_cumprod: Tensor
    """Scalar float32: the share after the last denoising step."""
    prediction_type: Literal["epsilon", "v_prediction"]
    """What the model predicts."""
    spacing: Literal["leading", "linspace", "trailing"]
    """How denoising steps are placed on the training timesteps, in diffusers' terms."""
    steps_offset: int
    """Added to each timestep of a leading spacing."""
    settings: Mapping[str, JsonValue]
    """The settings that the schedule was made from, for digests."""

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the config of a diffusers scheduler.

        Args:
            config: As ``scheduler_config.json`` holds it.

        Returns:
            The schedule.

        Raises:
            ModelError: The scheduler clips its predictions, or the model predicts something else.
        """
        scheduler = ddim_scheduler(config)
        settings: Any = scheduler.config
        if settings.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the model's scheduler predicts {settings.prediction_type!r}; "
                "expected 'epsilon' or 'v_prediction'"
            )
        if settings.thresholding or settings.clip_sample:
            raise ModelError(
                "the model's scheduler clips its predictions (clip_sample or thresholding), so a "
                "step is not a Gaussian around the model's output; latent models set both to false"
            )
        return cls(
            scheduler=dict(config),
            alphas_cumprod=scheduler.alphas_cumprod.cpu(),
            final_alpha_cumprod=torch.as_tensor(scheduler.final_alpha_cumprod).cpu(),
            prediction_type=settings.prediction_type,
            spacing=settings.timestep_spacing,
            steps_offset=settings.steps_offset,
            settings={name: _plain(getattr(settings, name)) for name in _SETTINGS},
        )

    @property
    def training_timesteps(self) -> int:
        """N, the number of timesteps that the model was trained with."""
        return len(self.alphas_cumprod)

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """The settings."""
        return {"schedule": dict(self.settings)}

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Noise clean latents; the target is epsilon or v (arXiv 2202.00512)."""
        alpha = self._alpha_at(times, clean)
        signal, spread = alpha**0.5, (1 - alpha) ** 0.5
        noisy = signal * clean + spread * noise
        if self.prediction_type == "epsilon":
            return noisy, noise
        return noisy, signal * noise - spread * clean

    def predicted_clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """Return x_0 by the formula of what the model predicts, epsilon or v."""
        return self.clean_of(self._alpha_at(times, noisy), noisy, prediction)

    def clean_of(self, alpha: Tensor, latents: Tensor, output: Tensor) -> Tensor:
        """Return the clean latents that a prediction implies, [B, ...].

        Args:
            alpha: [B, 1, ...], the signal's share of variance in the latents.
            latents: [B, ...], x_t.
            output: [B, ...], the prediction.
        """
        beta = 1 - alpha
        if self.prediction_type == "epsilon":
            return (latents - beta**0.5 * output) / alpha**0.5
        return (alpha**0.5) * latents - (beta**0.5) * output

    def training_time(self, generator: torch.Generator) -> Tensor:
        """Draw a training timestep, all with equal chance."""
        return torch.randint(self.training_timesteps, (), generator=generator).float()

    def solver_settings(self) -> dict[str, JsonValue]:
        """Return nothing: the model's own scheduler says it all."""
        return {}

    def solver_times(self, steps: int) -> dict[str, float]:
        """Return nothing."""
        return {}

    def check_times(self, times: Tensor) -> None:
        """Check that the model does not predict noise where its input is nothing else."""
        if self.prediction_type == "epsilon" and not self.alphas_cumprod[times.long().cpu()].all():
            raise ModelError(
                f"the model predicts noise, and at timestep {int(times[0])} its input is "
                "pure noise (rescale_betas_zero_snr), which determines no image. Expected a model "
                "that predicts v; or set timestep_spacing to 'leading' in the model's "
                "scheduler_config.json, which leaves that timestep out"
            )

    def _alpha_at(self, times: Tensor, like: Tensor) -> Tensor:
        """Return the signal's share of variance at some times, in the shape [B, 1, ...]."""
        alphas = self.alphas_cumprod.to(like.device, like.dtype)
        return expand_like(alphas[times.long()], like)


def _plain(value: Any) -> JsonValue:
    return [float(each) for each in value] if isinstance(value, list | tuple) else value


def ddim_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """Return diffusers' DDIM scheduler on the noise schedule of another scheduler.

    Args:
        config: Of any scheduler, as ``scheduler_config.json`` holds it.
    """
    from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]

    # Other schedulers have no such setting, and DDIM's own default of true is for pixel models.
    clip_sample = config.get("clip_sample", False)
    return cast(DDIMScheduler, DDIMScheduler.from_config(dict(config), clip_sample=clip_sample))
