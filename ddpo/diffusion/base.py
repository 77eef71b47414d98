"""What a denoising process has to provide: its steps, and the Gaussian of each if it has one.

Steps are indexed by number, 0 being the noisiest; times are floats on the model's own axis.

Shapes: B samples or (sample, step) pairs, T denoising steps; [B, ...] are latents of any rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

from ddpo.algorithms.step_weighting import StepScales
from ddpo.basics.tensors import mean_per_row
from ddpo.models.schedule import Schedule


@dataclass(frozen=True)
class Transition:
    """Normal(mean, std² I), one per pair: p(x_{t-1} | x_t)."""

    mean: Tensor
    """[B, ...]."""
    std: Tensor
    """[B, 1, ...]; 0 where a step is deterministic."""
    divergence_scale: Tensor | None = None
    """[B, 1, ...], what stands for the standard deviation in KL penalties where a process publishes
    another than its own."""
    normalized: bool = True
    """Whether log-probs are log-densities. Some processes publish the squared distance alone."""

    @property
    def divergence_std(self) -> Tensor:
        """[B, 1, ...], the standard deviation that KL penalties divide by."""
        return self.std if self.divergence_scale is None else self.divergence_scale

    def draw(self, noise: Tensor) -> Tensor:
        """Return x_{t-1} [B, ...] for standard normal ``noise`` of the same shape."""
        return self.mean + self.std * noise

    def log_prob(self, next_latents: Tensor) -> Tensor:
        """Return the log-density of ``next_latents``, averaged over latent dimensions.

        Without variance and constants where the process leaves them out.

        Averaged, not summed, as in every published implementation: the clip range of 1e-4 is made
        for it.

        Args:
            next_latents: [B, ...], x_{t-1}.

        Returns:
            [B]; 0 where the step is deterministic.
        """
        deterministic = self.std == 0
        distance = (next_latents.detach() - self.mean) ** 2
        if self.normalized:
            std = torch.where(deterministic, torch.ones_like(self.std), self.std)
            density = -distance / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        else:
            density = -distance
        return mean_per_row(density).masked_fill(deterministic.flatten(), 0.0)


@dataclass(frozen=True)
class PlainScheduler:
    """A scheduler of diffusers, as made from the config of a pipeline's own."""

    name: str
    """Its class."""
    settings: Mapping[str, JsonValue]
    """What replaces the pipeline's own settings."""


class Stepper(Protocol):
    """Takes one batch from noise to clean, a call a step and in their order; it may remember."""

    def __call__(
        self, number: int, output: Tensor, latents: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the next latents, and their log-probs.

        Args:
            number: The step's.
            output: [B, ...], the model's prediction at that step's time, after guidance.
            latents: [B, ...], x_t.
            noise: [B, ...], standard normal; for a step that draws any.

        Returns:
            [B, ...], and [B], averaged over latent dimensions; 0 where the step is deterministic.
        """
        ...


class Process(ABC):
    """A denoising process on a model's schedule.

    Args:
        schedule: The model's, of the process's own class.
        sampler: Settings, of the process's own class.
        device: Where it computes.
        noisy: Steps that may draw noise; all others are deterministic. All steps by default.
    """

    schedule_type: ClassVar[type[Schedule]]
    """The class of schedules that it runs on."""
    schedule: Any
    """The model's."""
    times: Tensor
    """[T] float32, from noisy to clean: the time that the model is given at each step."""
    initial_noise_scale: float = 1.0
    """Standard deviation of the starting latents."""

    @abstractmethod
    def __init__(
        self,
        schedule: Any,
        sampler: Any,
        device: torch.device,
        noisy: range | None = None,
    ) -> None: ...

    @property
    def steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.times)

    @abstractmethod
    def stepper(self) -> Stepper:
        """Return what takes one batch from noise to clean: a new one for each batch."""

    @abstractmethod
    def stochastic(self) -> Tensor:
        """Return [T] bool: steps that draw noise. The others have no log-prob and no gradient."""

    @abstractmethod
    def identity(self) -> Mapping[str, JsonValue]:
        """Return what makes two processes draw from the same distributions, as plain JSON."""

    @property
    def plain_scheduler(self) -> PlainScheduler | None:
        """Which scheduler plain diffusers needs to sample likewise, without noise.

        None for the pipeline's own.
        """
        return None


class MarkovProcess(Process):
    """A process whose steps remember nothing: each is a Gaussian around what x_t alone implies."""

    @abstractmethod
    def transition(self, steps: Tensor, output: Tensor, latents: Tensor) -> Transition:
        """Return the distribution of the next latents.

        Args:
            steps: [B] int64, the number of each pair's step.
            output: [B, ...], the model's prediction at that step's time, after guidance.
            latents: [B, ...], x_t.
        """

    def stepper(self) -> Stepper:
        """Return what draws from the transitions."""
        return self._step

    def _step(
        self, number: int, output: Tensor, latents: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        steps = torch.full((len(latents),), number, device=latents.device)
        transition = self.transition(steps, output, latents)
        after = transition.draw(noise)
        return after, transition.log_prob(after)

    def scales(self, steps: Sequence[int]) -> StepScales:
        """Return what the size of some steps' scores depends on.

        Args:
            steps: K numbers of steps that draw noise.
        """
        numbers = torch.tensor(steps, device=self.times.device)
        # A mean is linear in latents and prediction: at latents 0 and prediction 1 it is the slope.
        zeros = torch.zeros(len(steps), 1, 1, 1, device=self.times.device)
        step = self.transition(numbers, torch.ones_like(zeros), zeros)
        slopes = step.mean.flatten().abs()
        return StepScales(step.std.flatten(), slopes, self.lengths(numbers, slopes))

    def lengths(self, steps: Tensor, slopes: Tensor) -> Tensor:
        """Return the length of each step in the model's own time, [K]; by default the slope.

        On a flow without noise a step's slope is its length, which stands in for it here.

        Args:
            steps: [K] int64.
            slopes: [K], as in :class:`StepScales`.
        """
        return slopes
