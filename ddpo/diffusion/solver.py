"""What multistep solvers share: the flow from noise to images without noise, by diffusers' code.

A step reads what the model predicted in the steps before it, so that few steps are enough.
No step is a Gaussian: there are no log-probs.

Shapes: B samples, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import JsonValue
from torch import Tensor

from ddpo.config import SolverSampler
from ddpo.diffusion.base import PlainScheduler, Process, Stepper
from ddpo.errors import ConfigError
from ddpo.models.schedule import Schedule
from ddpo.models.solvers import changed_arguments, make_solver, solver_arguments


class Solver(Process):
    """A multistep solver; times are whole numbers, as diffusers' schedulers give them.

    Args:
        schedule: The model's, of diffusion or of a flow.
        sampler: Steps and order.
        device: Where it computes.
        noisy: Steps that may draw noise, which none does.

    Raises:
        ConfigError: The model's schedule has too few timesteps, or settings for which there is no
            such solver.
        ModelError: The model predicts noise at a step whose input is pure noise.
    """

    name: ClassVar[str]
    """As the sampler's `type`."""
    scheduler_name: ClassVar[str]
    """Its class in diffusers."""
    own_settings: ClassVar[Mapping[str, JsonValue]]
    """Settings that make it what its name says, whatever the model's own scheduler is."""
    schedule_type = Schedule

    def __init__(
        self,
        schedule: Schedule,
        sampler: SolverSampler,
        device: torch.device,
        noisy: range | None = None,
    ) -> None:
        del noisy
        self.schedule = schedule
        self.order = sampler.order
        self._settings = {
            **self.own_settings,
            "solver_order": sampler.order,
            **schedule.solver_settings(),
        }
        self._count = sampler.steps
        if sampler.steps > schedule.training_timesteps:
            raise _too_many(schedule, sampler.steps)
        scheduler = self._scheduler()
        # A step between equal noise levels divides by its length.
        if not (scheduler.sigmas.diff() < 0).all():
            raise _too_many(schedule, sampler.steps)
        schedule.check_times(scheduler.timesteps)
        self.times = scheduler.timesteps.float().to(device)

    def stepper(self) -> Stepper:
        """Return a scheduler of diffusers, which remembers what it is given."""
        scheduler = self._scheduler()
        times = scheduler.timesteps

        def step(
            number: int, output: Tensor, latents: Tensor, noise: Tensor
        ) -> tuple[Tensor, Tensor]:
            del noise
            (after,) = scheduler.step(output, times[number], latents, return_dict=False)
            return after, torch.zeros(len(after), device=after.device)

        return step

    def stochastic(self) -> Tensor:
        """Return [T] false."""
        return torch.zeros_like(self.times, dtype=torch.bool)

    def identity(self) -> Mapping[str, JsonValue]:
        """Return the model's schedule, the number of steps, the order, and the solver's settings.

        Of those settings, what is not diffusers' default.
        """
        return {
            "type": self.name,
            **self.schedule.identity,
            "solver": changed_arguments(self.scheduler_name, self._arguments()),
            "order": self.order,
            "steps": self.steps,
        }

    @property
    def plain_scheduler(self) -> PlainScheduler:
        """The solver's."""
        return PlainScheduler(self.scheduler_name, self._settings)

    def _arguments(self) -> dict[str, Any]:
        return solver_arguments(self.scheduler_name, self.schedule, self._settings)

    def _scheduler(self) -> Any:
        return make_solver(self.scheduler_name, self.schedule, self._arguments(), self._count)


def _too_many(schedule: Schedule, steps: int) -> ConfigError:
    return ConfigError(
        f"sampler.steps is {steps}, more than the model's {schedule.training_timesteps} training "
        "timesteps allow; set it lower"
    )
