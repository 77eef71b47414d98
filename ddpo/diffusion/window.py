"""The steps that an epoch trains: all of them, or a window of consecutive ones."""

from __future__ import annotations

import torch

from ddpo.basics.randomness import derive_seed
from ddpo.config import RunConfig, SamplerConfig
from ddpo.diffusion import PROCESSES, MarkovProcess, Process
from ddpo.errors import ConfigError
from ddpo.models import Policy
from ddpo.models.schedule import Schedule


def sampler_of_epoch(policy: Policy, config: RunConfig, epoch: int) -> SamplerConfig:
    """Resolve where the window of an epoch lies, which depends on run seed and epoch alone.

    A random or moving window is one of those that contain a step to train on, whatever the
    algorithm: samples may be trained on by another one. Random ones have equal chances, a moving
    one takes them in turn. An algorithm that trains final latents takes any window.

    Args:
        policy: Its noise schedule says which steps draw noise.
        config: Sampler and seed.
        epoch: The epoch, from 0.

    Returns:
        The sampler, with a window (if any) whose position is a number.

    Raises:
        ConfigError: The window contains no step that draws noise, so nothing would be trained.
    """
    return _of_epoch(policy.schedule, policy.device, config, epoch)


def check_sampler(schedule: Schedule, config: RunConfig) -> None:
    """Check that a model can be denoised as the config says, before the model is loaded.

    Args:
        schedule: The model's.
        config: Sampler and algorithm.

    Raises:
        ConfigError: There are more steps than the model's schedule has; or as
            :func:`sampler_of_epoch`.
    """
    check_steps(schedule, config.sampler)
    _of_epoch(schedule, torch.device("cpu"), config, 0)


def check_steps(schedule: Schedule, sampler: SamplerConfig) -> None:
    """Check that a model can be denoised in as many steps, before it is loaded.

    Args:
        schedule: The model's.
        sampler: The sampler; its window does not matter.

    Raises:
        ConfigError: There are more steps than the model's schedule has.
    """
    _process(schedule, sampler.changed(window=None), torch.device("cpu"))


def _of_epoch(
    schedule: Schedule, device: torch.device, config: RunConfig, epoch: int
) -> SamplerConfig:
    window = config.sampler.window
    if window is None:
        return config.sampler
    process = _process(schedule, config.sampler.changed(window=None), device)
    stochastic = process.stochastic()
    every = range((window.before or process.steps) - window.steps + 1)
    positions = [first for first in every if stochastic[first : first + window.steps].any()]
    steps_are_trained = config.algorithm.needs.data == "trajectories"
    if not steps_are_trained and (isinstance(window.position, int) or not positions):
        positions = list(every)
    position = window.position
    if not positions:
        raise ConfigError(
            f"no window of {window.steps} steps before step {window.before} contains a step that "
            "draws noise, so nothing would be trained; raise sampler.window.before"
        )
    if position == "random":
        position = positions[derive_seed(config.seed, "window", epoch) % len(positions)]
    elif position == "moving":
        position = positions[epoch // window.move_every % len(positions)]
    elif position not in positions:
        raise ConfigError(
            f"sampler.window contains no step to train on: at position {position} there is only "
            f"step {position} (time {float(process.times[position]):g}), which this model takes "
            "without noise, so it has no log-prob and no gradient; set sampler.window.position to "
            f"at most {positions[-1]}"
        )
    return config.sampler.changed(window=window.changed(position=position))


def process_of(policy: Policy, sampler: SamplerConfig) -> Process:
    """Return a sampler's process on the policy's noise schedule and device.

    Args:
        policy: Whose latents are denoised.
        sampler: If noise is drawn in a window only, as :func:`sampler_of_epoch` resolved it.
    """
    return _process(policy.schedule, sampler, policy.device)


def markov_process_of(policy: Policy, sampler: SamplerConfig) -> MarkovProcess:
    """Return a sampler's process as :func:`process_of` does, whose steps are Gaussians.

    Raises:
        ConfigError: They are not: the sampler is a solver.
    """
    process = process_of(policy, sampler)
    if not isinstance(process, MarkovProcess):
        raise ConfigError(str(sampler.deterministic_because))
    return process


def _process(schedule: Schedule, sampler: SamplerConfig, device: torch.device) -> Process:
    process = PROCESSES[sampler.type]
    if not isinstance(schedule, process.schedule_type):
        fitting = [
            name for name, each in PROCESSES.items() if isinstance(schedule, each.schedule_type)
        ]
        raise ConfigError(
            f"sampler.type is {sampler.type!r}, which needs a {process.schedule_type.kind}, but "
            f"the model is a {schedule.kind}; set it to {' or '.join(fitting)}"
        )
    window = sampler.window
    noisy = window_steps(sampler) if window is not None and window.noise_only_there else None
    return process(schedule, sampler, device, noisy)


def whole_process(policy: Policy, sampler: SamplerConfig) -> Process:
    """Return a sampler's process as it is without a window."""
    return process_of(policy, sampler.changed(window=None))


def window_steps(sampler: SamplerConfig) -> range:
    """Return the numbers of the steps in a sampler's window, or of all steps.

    Args:
        sampler: As :func:`sampler_of_epoch` resolved it.

    Raises:
        ValueError: The window has no position yet.
    """
    if sampler.window is None:
        return range(sampler.steps)
    first = sampler.window.position
    if isinstance(first, str):
        raise ValueError(
            f"a {first} window has a position within an epoch only; call `sampler_of_epoch` first"
        )
    return range(first, first + sampler.window.steps)
