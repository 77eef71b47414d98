"""The schedule of flow-matching models: straight lines from images to noise.

Shapes: B samples; [B, ...] are latents of any rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from ddpo.basics.tensors import expand_like
from ddpo.errors import ConfigError, ModelError
from ddpo.models.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,  # pyright: ignore[reportPrivateImportUsage]
    )

_SETTINGS = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "time_shift_type",
)
"""What sigmas are made from. A scheduler's file has more, for other processes than ours."""

_UNSOLVED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal")
"""Settings that diffusers' multistep solvers lack for flows, or read as those of diffusion."""


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """The rectified flow that a model was trained on (arXiv 2209.03003, 2403.03206).

    x_sigma = (1 - sigma) x_0 + sigma eps for sigma in [0, 1]; the model predicts the velocity
    eps - x_0. Its time axis is N sigma.
    """

    kind = "flow-matching model"

    scheduler: Mapping[str, Any]
    """The config of the model's own scheduler in diffusers."""
    settings: Mapping[str, JsonValue]
    """Those of the model's scheduler, for digests."""
    patch: int
    """Latent pixels along one side of a token."""
    tokens: int
    """Tokens of an image; a dynamic shift depends on it."""
    from_one: bool = False
    """Whether steps are spaced from sigma 1 to 1/T before the shift, as FLUX's pipeline does it,
    and not over the scheduler's own range."""
    empirical_shift: bool = False
    """Whether a dynamic shift depends on the number of steps too, as in FLUX.2's pipeline."""

    @classmethod
    def from_scheduler(
        cls,
        config: Mapping[str, Any],
        patch: int,
        latent_shape: Sequence[int],
        *,
        from_one: bool = False,
        empirical_shift: bool = False,
    ) -> FlowSchedule:
        """Read the config of diffusers' scheduler for flow matching.

        Args:
            config: As ``scheduler_config.json`` holds it.
            patch: Latent pixels along one side of a token.
            latent_shape: Shape of one image's latents, [C, h, w].
            from_one: See the field.
            empirical_shift: See the field.

        Raises:
            ModelError: Its steps are stochastic, or its sigmas inverted.
        """
        settings: Any = flow_scheduler(config).config
        for name in ("stochastic_sampling", "invert_sigmas"):
            if settings.get(name):
                raise ModelError(
                    f"the model's scheduler sets {name}; expected the deterministic flow from "
                    "sigma 1 to 0 that Stable Diffusion 3 and FLUX have"
                )
        known = {name: settings.get(name) for name in _SETTINGS}
        tokens = _tokens(latent_shape, patch)
        return cls(dict(config), known, patch, tokens, from_one, empirical_shift)

    @property
    def training_timesteps(self) -> int:
        """N, the length of the model's time axis."""
        return int(cast(int, self.settings["num_train_timesteps"]))

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """The settings, and what the pipeline adds to them."""
        return {
            "schedule": dict(self.settings),
            "from_one": self.from_one,
            "empirical_shift": self.empirical_shift,
            "tokens": self.tokens,
        }

    @property
    def shift(self) -> float:
        """The scheduler's static shift; 1 where it depends on the image's size."""
        dynamic = self.settings["use_dynamic_shifting"]
        return 1.0 if dynamic else float(cast(float, self.settings["shift"]))

    def at(self, latent_shape: Sequence[int]) -> Self:
        """Return the schedule for latents of another size."""
        return replace(self, tokens=_tokens(latent_shape, self.patch))

    def sigmas(self, steps: int) -> Tensor:
        """Place denoising steps as diffusers' pipelines do.

        Args:
            steps: T.

        Returns:
            [T+1] float32 on the CPU, from 1 or a little less to 0.

        Raises:
            ConfigError: There are more steps than training timesteps.
        """
        if steps > self.training_timesteps:
            raise ConfigError(
                f"sampler.steps is {steps}, more than the model's {self.training_timesteps} "
                f"training timesteps; set it to at most {self.training_timesteps}"
            )
        scheduler = flow_scheduler(self.settings)
        arguments: dict[str, Any] = {}
        if self.from_one:
            arguments["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        if self.settings["use_dynamic_shifting"]:
            arguments["mu"] = self._mu(steps)
        scheduler.set_timesteps(steps, device="cpu", **arguments)
        return cast(Tensor, scheduler.sigmas)

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
        shift = self.shift
        return self.time_scale * shift * sigma / (1 + (shift - 1) * sigma)

    def solver_settings(self) -> dict[str, JsonValue]:
        """Return that it is a flow, and its static shift."""
        unsolved = [name for name in _UNSOLVED if self.settings[name]]
        if self.settings["time_shift_type"] != "exponential":
            unsolved.append("time_shift_type")
        if unsolved:
            raise ConfigError(
                f"the model's scheduler sets {' and '.join(unsolved)}, which diffusers' multistep "
                "solvers do not have for flow-matching models; set sampler.type to ode"
            )
        return {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": self.shift,
        }

    def solver_times(self, steps: int) -> dict[str, float]:
        """Return the logarithm of a dynamic shift."""
        return {"mu": self._mu(steps)} if self.settings["use_dynamic_shifting"] else {}

    def check_times(self, times: Tensor) -> None:
        """Check nothing: a velocity determines an image at every time."""
        del times

    def _mu(self, steps: int) -> float:
        """Return the logarithm of the shift at this size, linear in the number of tokens."""
        if self.empirical_shift:
            from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

            return compute_empirical_mu(self.tokens, steps)
        fewest, most, low, high = (
            float(cast(float, self.settings[name]))
            for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        )
        slope = (high - low) / (most - fewest)
        return self.tokens * slope + (low - slope * fewest)


def flow_scheduler(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Return diffusers' scheduler with a config's settings."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,  # pyright: ignore[reportPrivateImportUsage]
    )

    made = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    return cast(FlowMatchEulerDiscreteScheduler, made)


def _tokens(latent_shape: Sequence[int], patch: int) -> int:
    return math.prod(length // patch for length in latent_shape[1:])
