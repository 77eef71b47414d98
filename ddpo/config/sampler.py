"""Settings of sampling: one class per denoising process, and the window of trained steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from ddpo.basics.part import Part, is_off


class WindowConfig(Part):
    """Train some consecutive denoising steps only."""

    steps: PositiveInt
    """Number of steps. An update costs steps / T of what training all of them costs."""
    position: NonNegativeInt | Literal["random"] = "random"
    """First step of the window, 0 being the noisiest; or `random`, chosen for each epoch."""
    noise_only_there: bool = False
    """Add noise only in the steps of the window and take the others deterministically, so that an
    image's reward reflects the noise of the window."""


class SamplerConfig(Part, ABC):
    """What the samplers of all denoising processes have in common."""

    type: Any
    """Name of the denoising process."""
    steps: PositiveInt = 50
    """Denoising steps per image, T."""
    guidance_scale: float = Field(default=5.0, ge=1.0)
    """Classifier-free guidance, in sampling and in the update alike; 1 turns it off."""
    window: WindowConfig | None = Field(default=None, exclude_if=is_off)
    """Steps to train; all by default."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether steps draw noise, so that they have log-probs to train on."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """The settings in a few words, for people."""

    @model_validator(mode="after")
    def _window_fits(self) -> SamplerConfig:
        window = self.window
        if window is None:
            return self
        if window.steps > self.steps:
            raise ValueError(
                f"window.steps {window.steps} is more than the {self.steps} denoising steps; "
                f"set it to at most {self.steps}"
            )
        last = self.steps - window.steps
        if window.position != "random" and window.position > last:
            raise ValueError(
                f"a window of {window.steps} steps at position {window.position} extends beyond "
                f"the last of {self.steps} denoising steps; set window.position to at most {last}"
            )
        return self


class DdimSampler(SamplerConfig):
    """DDIM with noise (arXiv 2010.02502)."""

    type: Literal["ddim"] = "ddim"
    """The denoising process; may be left out."""
    eta: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of DDPM's noise that each step draws. 0 is deterministic, which leaves only
    regression anything to train on."""

    @property
    def stochastic(self) -> bool:
        """Whether eta is above 0."""
        return self.eta > 0

    @property
    def summary(self) -> str:
        """Steps, eta and guidance."""
        return f"{self.steps} steps, eta {self.eta}, guidance {self.guidance_scale}"


SAMPLERS = (DdimSampler,)
"""The registry; the process of each is in `ddpo.diffusion`."""


def _type_or_ddim(value: Any) -> Any:
    return value.get("type", "ddim") if isinstance(value, dict) else getattr(value, "type", None)


if TYPE_CHECKING:
    AnySampler = SamplerConfig
else:
    AnySampler = Annotated[
        Union[  # noqa: UP007
            tuple(Annotated[kind, Tag(kind.model_fields["type"].default)] for kind in SAMPLERS)
        ],
        Discriminator(_type_or_ddim),
    ]
