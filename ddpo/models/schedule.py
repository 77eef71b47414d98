"""What a denoising process needs to know of a model: its noise schedule, free of any pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import JsonValue
from torch import Tensor

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

    @property
    @abstractmethod
    def training_timesteps(self) -> int:
        """N, the number of timesteps that the model was trained with."""

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
