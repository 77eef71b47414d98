"""Plan a fork: its config, its name, and the checks to pass before it is created."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ddpo.config import RunConfig
from ddpo.config.files import parse_config
from ddpo.config.overrides import apply_overrides
from ddpo.config.s3 import S3Options
from ddpo.errors import ConfigError
from ddpo.rewards import load_reward
from ddpo.runs.forks.checks import (
    check_kept,
    check_on_policy,
    check_sampler,
    committed_rollouts,
)
from ddpo.runs.run import Fork, Run
from ddpo.store import keys

Statistics = Literal["rebuild", "reset"]


def fork_config(
    parent: Run,
    epoch: int,
    *,
    reward: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    statistics: Statistics = "rebuild",
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Return the config of a fork: the parent's, with changes.

    Args:
        parent: The run to fork.
        epoch: The fork's first epoch.
        reward: Name of the new reward; by default the parent's reward.
        parameters: Parameters of the new reward.
        epochs: Total number of epochs, including those before the fork; by default the parent's.
        statistics: Rebuild the prompt statistics under the fork's reward, or start without any.
        overrides: Changes of other settings, as ``a.b=value``.

    Raises:
        ConfigError: The parent has not committed the epoch, or a setting must not be changed.
        PolicyMismatch: The saved samples come from another sampler.
    """
    if parameters and reward is None:
        raise ConfigError(
            f"parameters {', '.join(parameters)} belong to a reward, but no reward is named; name "
            f"one, such as {parent.config.reward.name}, the reward of {parent.run_id!r}"
        )
    saved = committed_rollouts(parent, epoch)
    raw: dict[str, Any] = parent.config.whole()
    # The store as it was opened now; the address that the parent was started with may be outdated.
    s3 = (parent.store.s3 or S3Options()).model_dump(mode="json")
    raw["storage"] |= {"root": parent.store.root, "s3": s3}
    raw["tracking"].pop("parent", None)  # a fork is shown below its own parent
    if reward is not None:
        raw["reward"] |= {"name": reward, "parameters": dict(parameters or {})}
    if epochs is not None:
        raw["epochs"] = epochs
    raw["fork"] = {"run_id": parent.run_id, "epoch": epoch, "statistics": statistics}
    apply_overrides(raw, overrides)
    config = parse_config(raw, f"a fork of {parent.run_id} at epoch {epoch}")
    _check_unchanged(config, parent, shards=len(saved))
    check_sampler(_fork(config, parent))
    return config


def fork_name(parent: Run, config: RunConfig, name: str | None = None) -> str:
    """Return a fork's name, once all that a new fork would inherit has been checked.

    A fork that exists has inherited it, or retention spares it.

    Args:
        parent: The parent.
        config: The fork's config.
        name: The name; by default made of the parent's name, the epoch, and a new reward's id.

    Raises:
        DdpoError: The fork is new, and something that it would inherit is deleted or comes from
            another policy (`check_kept`, `check_on_policy`).
    """
    fork = _fork(config, parent)
    if name is None:
        name = f"{parent.run_id}-from-{fork.epoch}"
        reward = load_reward(config.reward.name, config.reward.parameters).identity
        if reward.digest != parent.reward_digest:
            name = f"{name}-{reward.reward_id}"
    if not parent.store.exists(keys.run_key(name)):
        check_kept(fork)
        check_on_policy(fork)
    return name


def _fork(config: RunConfig, parent: Run) -> Fork:
    if config.fork is None:
        raise ConfigError(f"a fork of {parent.run_id} needs the section `fork` in its config")
    return Fork(parent.store, config, config.fork)


def _check_unchanged(config: RunConfig, parent: Run, shards: int) -> None:
    """Refuse changes that the saved samples cannot be trained with."""
    rollouts = config.rollouts
    problems = [
        f"{name} is {value}, but the saved samples have {expected}"
        for name, value, expected in (
            ("trainable", config.trainable, parent.config.trainable),
            ("rollouts.shard_size", rollouts.shard_size, parent.config.rollouts.shard_size),
            (
                "rollouts.samples_per_prompt",
                rollouts.samples_per_prompt,
                parent.config.rollouts.samples_per_prompt,
            ),
            (
                "the number of shards",
                rollouts.samples_per_epoch // rollouts.shard_size,
                shards,
            ),
        )
        if value != expected
    ]
    if (parent.config.stored_trajectories, config.stored_trajectories) == ("final", "full"):
        problems.append(
            f"{config.algorithm.type} trains on all steps, but {parent.config.algorithm.type} "
            "saved only the final latents. Start a new run"
        )
    if problems:
        raise ConfigError(f"a fork of {parent.run_id} cannot start: {'; '.join(problems)}")
