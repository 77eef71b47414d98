"""Settings of sampling: one class per denoising process, and the window of trained steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from ddpo.basics.part import Part, is_off
from ddpo.errors import ConfigError

_MOVE_EVERY = 25


def _is_default_move(value: Any) -> bool:
    return value == _MOVE_EVERY


class WindowConfig(Part):
    """Train some consecutive denoising steps only."""

    steps: PositiveInt
    """Number of steps. An update costs steps / T of what training all of them costs."""
    position: NonNegativeInt | Literal["random", "moving"] = "random"
    """First step of the window, 0 being the noisiest; or `random`, chosen for each epoch; or
    `moving`, one step on after every `move_every` epochs, from the noisiest to the cleanest and
    again (MixGRPO, arXiv 2507.21802)."""
    move_every: PositiveInt = Field(default=_MOVE_EVERY, exclude_if=_is_default_move)
    """How many epochs a moving window stays where it is."""
    before: PositiveInt | None = Field(default=None, exclude_if=is_off)
    """Random and moving windows end before this step; the last one by default. Half of all steps is
    what Flow-GRPO-Fast takes."""
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
    """Classifier-free guidance, in sampling and in the update on trajectories alike; 1 turns it
    off."""
    window: WindowConfig | None = Field(default=None, exclude_if=is_off)
    """Steps to train; all by default."""

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise, so that they have log-probs to train on."""
        return self.deterministic_because is None

    @property
    def log_probs_are_densities(self) -> bool:
        """Whether log-probs are log-densities; else, squared distances alone."""
        return True

    @property
    @abstractmethod
    def summary(self) -> str:
        """The settings in a few words, for people."""

    @abstractmethod
    def at_inference(self, eta: float) -> SamplerConfig:
        """Return the sampler that users of the model sample with, at the same steps and guidance.

        Args:
            eta: Share of DDPM's noise.

        Raises:
            ConfigError: It is above 0 and the model's process has no such setting.
        """

    @property
    @abstractmethod
    def deterministic_because(self) -> str | None:
        """Why steps draw no noise, with the way out; None where they draw some."""

    @property
    @abstractmethod
    def pipeline_arguments(self) -> dict[str, float]:
        """What a diffusers pipeline takes to sample likewise."""

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
        if window.before is not None and not window.steps <= window.before <= self.steps:
            raise ValueError(
                f"window.before is {window.before}; expected {window.steps} to {self.steps}, so "
                f"that a window of {window.steps} of the {self.steps} denoising steps fits"
            )
        if isinstance(window.position, int) and window.position > last:
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
    """Share of DDPM's noise that each step draws. 0 is deterministic, which leaves only what trains
    on final latents anything to train on."""

    @property
    def summary(self) -> str:
        """Steps, eta and guidance."""
        return f"{self.steps} steps, eta {self.eta}, guidance {self.guidance_scale}"

    def at_inference(self, eta: float) -> DdimSampler:
        """Return the sampler without its window, and with another eta."""
        return self.changed(window=None, eta=eta)

    @property
    def deterministic_because(self) -> str | None:
        """Eta is 0."""
        return (
            None if self.eta else _deterministic("eta is 0", "set it above 0 (the paper uses 1.0)")
        )

    @property
    def pipeline_arguments(self) -> dict[str, float]:
        """Steps, guidance and eta."""
        return {**_steps_and_guidance(self), "eta": self.eta}


class FlowSampler(SamplerConfig, ABC):
    """What the samplers of flow-matching models have in common."""

    steps: PositiveInt = 10
    """Denoising steps per image, T."""
    guidance_scale: float = Field(default=4.5, ge=1.0)
    """Classifier-free guidance, in sampling and in the update on trajectories alike; 1 turns it
    off. A model that was distilled for guidance gets it as an input."""

    @property
    @abstractmethod
    def noise(self) -> float:
        """The noise level, in the units of the process; 0 is the flow without noise."""

    @property
    def summary(self) -> str:
        """Steps, process, noise level and guidance."""
        level = f", noise level {self.noise:g}" if self.noise else ""
        return f"{self.steps} steps of {self.type}{level}, guidance {self.guidance_scale}"

    def at_inference(self, eta: float) -> OdeSampler:
        """Return the flow without noise."""
        if eta:
            raise ConfigError(
                f"eta is {eta:g}, which models of flow matching do not have: they are "
                "evaluated without noise; remove it"
            )
        return OdeSampler(steps=self.steps, guidance_scale=self.guidance_scale)

    @property
    def deterministic_because(self) -> str | None:
        """The noise level is 0."""
        return None if self.noise else _deterministic("noise_level is 0", "set it above 0")

    @property
    def pipeline_arguments(self) -> dict[str, float]:
        """Steps and guidance."""
        return _steps_and_guidance(self)


class FlowSdeSampler(FlowSampler):
    """Flow-GRPO's SDE (arXiv 2505.05470)."""

    type: Literal["flow_sde"]
    """The denoising process."""
    noise_level: float = Field(default=0.7, ge=0.0)
    """Factor of the noise; the published one for Stable Diffusion 3.5 by default."""

    @property
    def noise(self) -> float:
        """The noise level."""
        return self.noise_level


class FlowCpsSampler(FlowSampler):
    """Coefficients-preserving sampling (Flow-CPS): images in training are as clean as any."""

    type: Literal["flow_cps"]
    """The denoising process."""
    noise_level: float = Field(default=0.8, ge=0.0, le=1.0)
    """1 replaces all of the predicted noise by new noise; 0.8 is published."""

    @property
    def noise(self) -> float:
        """The noise level."""
        return self.noise_level

    @property
    def log_probs_are_densities(self) -> bool:
        """They leave the variance out, as published."""
        return False


class DanceSdeSampler(FlowSampler):
    """DanceGRPO's SDE (arXiv 2505.07818)."""

    type: Literal["dance_sde"]
    """The denoising process."""
    noise_level: float = Field(default=0.3, ge=0.0)
    """Standard deviation of the noise per unit of time; 0.3 is published."""

    @property
    def noise(self) -> float:
        """The noise level."""
        return self.noise_level


class OdeSampler(FlowSampler):
    """A flow without noise, which leaves only what trains on final latents anything to train on."""

    type: Literal["ode"] = "ode"
    """The denoising process."""

    @property
    def noise(self) -> float:
        """0."""
        return 0.0

    @property
    def deterministic_because(self) -> str:
        """The process is `ode`."""
        return _deterministic("type is ode", "use flow_sde, flow_cps or dance_sde")


class SolverSampler(SamplerConfig, ABC):
    """What multistep solvers have in common, for diffusion and for flow-matching models.

    They draw no noise, which leaves only what trains on final latents anything to train on.
    """

    steps: PositiveInt = 20
    """Denoising steps per image, T."""
    order: int = Field(default=2, ge=1, le=3)
    """Of the solver; 2 is usual with guidance, and 3 without it."""

    @property
    def summary(self) -> str:
        """Steps, solver, order and guidance."""
        solver = f"{self.type} of order {self.order}"
        return f"{self.steps} steps of {solver}, guidance {self.guidance_scale}"

    def at_inference(self, eta: float) -> SolverSampler:
        """Return the sampler without its window."""
        if eta:
            raise ConfigError(
                f"eta is {eta:g}, and sampler.type is {self.type}, which draws no noise; remove it"
            )
        return self.changed(window=None)

    @property
    def deterministic_because(self) -> str:
        """The process is a solver."""
        return _deterministic(
            f"type is {self.type}",
            "use ddim, or for flow-matching models flow_sde, flow_cps or dance_sde",
        )

    @property
    def pipeline_arguments(self) -> dict[str, float]:
        """Steps and guidance."""
        return _steps_and_guidance(self)


class DpmSolverSampler(SolverSampler):
    """DPM-Solver++, multistep (arXiv 2211.01095)."""

    type: Literal["dpm_solver"]
    """The denoising process."""


class UniPcSampler(SolverSampler):
    """UniPC (arXiv 2302.04867)."""

    type: Literal["unipc"]
    """The denoising process."""


def _deterministic(setting: str, way_out: str) -> str:
    return (
        f"sampler.{setting}: every step is then deterministic, has no log-prob and no gradient; "
        f"{way_out}"
    )


def _steps_and_guidance(sampler: SamplerConfig) -> dict[str, float]:
    return {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance_scale}


SAMPLERS = (
    DdimSampler,
    FlowSdeSampler,
    FlowCpsSampler,
    DanceSdeSampler,
    OdeSampler,
    DpmSolverSampler,
    UniPcSampler,
)
"""The registry; the process of each is in `ddpo.diffusion`."""


def _type_of(kind: type[SamplerConfig]) -> str:
    (name,) = get_args(kind.model_fields["type"].annotation)
    return name


def _type_or_ddim(value: Any) -> Any:
    return value.get("type", "ddim") if isinstance(value, dict) else getattr(value, "type", None)


if TYPE_CHECKING:
    AnySampler = SamplerConfig
else:
    AnySampler = Annotated[
        Union[  # noqa: UP007
            tuple(Annotated[kind, Tag(_type_of(kind))] for kind in SAMPLERS)
        ],
        Discriminator(_type_or_ddim),
    ]
