"""The steps that an epoch trains: all of them, or a window of consecutive ones."""

from __future__ import annotations

from ddpo.basics.randomness import derive_seed
from ddpo.config import RunConfig, SamplerConfig
from ddpo.diffusion.ddim import NoiseSchedule
from ddpo.errors import ConfigError
from ddpo.models import Policy


def sampler_of_epoch(policy: Policy, config: RunConfig, epoch: int) -> SamplerConfig:
    """Settle where the window of an epoch lies; it depends on run seed and epoch alone.

    A random window is one of those that hold a step to train on, all with equal chance,
    whatever the algorithm: samples may be trained on by another one. Regression trains clean
    latents, and takes any window.

    Args:
        policy: Its scheduler says which steps draw noise.
        config: Sampler and seed.
        epoch: The epoch, from 0.

    Returns:
        The sampler, with a window (if any) whose position is a number.

    Raises:
        ConfigError: The window holds no step that draws noise, so nothing would be trained.
    """
    window = config.sampler.window
    if window is None:
        return config.sampler
    schedule = _whole_schedule(policy, config.sampler)
    stochastic = schedule.stochastic()
    every = range(config.sampler.steps - window.steps + 1)
    positions = [first for first in every if stochastic[first : first + window.steps].any()]
    steps_are_trained = config.algorithm.needs.data == "trajectories"
    if not steps_are_trained and (window.position != "random" or not positions):
        positions = list(every)
    position = window.position
    if position == "random":
        position = positions[derive_seed(config.seed, "window", epoch) % len(positions)]
    elif position not in positions:
        raise ConfigError(
            f"sampler.window holds no step to train on: at position {position} there is timestep "
            f"{int(schedule.timesteps[position])} alone, a step that this model's scheduler takes "
            "without noise, so that it has no log-prob and no gradient; set "
            f"sampler.window.position to at most {positions[-1]}"
        )
    return config.sampler.model_copy(
        update={"window": window.model_copy(update={"position": position})}
    )


def noise_schedule(policy: Policy, sampler: SamplerConfig) -> NoiseSchedule:
    """Return a sampler's schedule on the policy's device.

    Args:
        policy: Whose scheduler it is.
        sampler: Steps, eta and, if noise is drawn there only, a window whose place is settled.
    """
    schedule = _whole_schedule(policy, sampler)
    if sampler.window is not None and sampler.window.noise_only_there:
        schedule = schedule.with_noise_only_at(window_steps(sampler))
    return schedule.to(policy.device)


def window_steps(sampler: SamplerConfig) -> range:
    """Return the steps of a sampler's window, or all, as columns of a trajectory.

    Args:
        sampler: As :func:`sampler_of_epoch` settled it.

    Raises:
        ValueError: The window's place is still to be drawn.
    """
    if sampler.window is None:
        return range(sampler.steps)
    first = sampler.window.position
    if first == "random":
        raise ValueError("a random window has a place in an epoch only: ask `sampler_of_epoch`")
    return range(first, first + sampler.window.steps)


def _whole_schedule(policy: Policy, sampler: SamplerConfig) -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(
        policy.pipeline.scheduler, steps=sampler.steps, eta=sampler.eta
    )
