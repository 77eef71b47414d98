"""diffusers' multistep solvers, made from the config of a model's own scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ddpo.models.schedule import Schedule


def solver_arguments(name: str, schedule: Schedule, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a solver's ``from_config`` makes of the config of the model's own scheduler.

    Without its warning of each setting of another scheduler: there is a new solver for each batch.

    Args:
        name: The solver's class.
        schedule: The model's.
        settings: What replaces the model's own settings.
    """
    own, known = schedule.scheduler, _parameters(name)
    left_out = own.get("_use_default_values", ())  # which have the solver's own defaults
    given = {each: own[each] for each in own if each in known and each not in left_out}
    return {**given, **settings}


def changed_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of a solver that are not its defaults."""
    known = _parameters(name)
    return {each: value for each, value in arguments.items() if value != known[each].default}


def make_solver(name: str, schedule: Schedule, arguments: Mapping[str, Any], steps: int) -> Any:
    """Return a new solver at its first step, on the CPU.

    Args:
        name: Its class.
        schedule: The model's.
        arguments: As :func:`solver_arguments` returned them.
        steps: T.
    """
    solver = _kind(name)(**arguments)
    solver.set_timesteps(steps, **schedule.solver_times(steps))
    solver.set_begin_index(0)
    return solver


def _kind(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_kind(name).__init__).parameters
