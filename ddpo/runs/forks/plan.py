"""Plan a fork: its config and its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ddpo.config import RunConfig
from ddpo.config.files import parse_config
from ddpo.config.overrides import apply_overrides
from ddpo.config.s3 import S3Options
from ddpo.errors import ConfigError
from ddpo.rewards import load_reward
from ddpo.runs.run import Run

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
        ConfigError: A setting is invalid, or an override contradicts another argument.
    """
    if parameters and reward is None:
        raise ConfigError(
            f"parameters {', '.join(parameters)} belong to a reward, but no reward is named; name "
            f"one, such as {parent.config.reward.name}, the reward of {parent.run_id!r}"
        )
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
    asked = {"fork.run_id": parent.run_id, "fork.epoch": epoch, "storage.root": parent.store.root}
    asked |= {"reward.name": reward} if reward is not None else {}
    asked |= {"epochs": epochs} if epochs is not None else {}
    asked |= {"fork.statistics": statistics} if statistics == "reset" else {}
    _check_asked(raw, asked)
    return parse_config(raw, f"a fork of {parent.run_id} at epoch {epoch}")


def fork_name(parent: Run, config: RunConfig) -> str:
    """Return a fork's name, made of the parent's name, the epoch, and a new reward's id.

    Args:
        parent: The parent.
        config: The fork's config.
    """
    name = f"{parent.run_id}-from-{config.fork.epoch if config.fork else 0}"
    reward = load_reward(config.reward.name, config.reward.parameters).identity
    return name if reward.digest == parent.reward_digest else f"{name}-{reward.reward_id}"


def _check_asked(raw: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse overrides that contradict the options of the fork.

    Args:
        raw: The fork's config.
        asked: Expected values by dotted key.
    """
    for key, expected in asked.items():
        found: Any = raw
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found != expected:
            raise ConfigError(
                f"the fork is requested with {key} {expected!r}, but an override sets it to "
                f"{found!r}; set it only once: ddpo fork RUN --epoch N, with --reward, --epochs, "
                "--root and --reset-statistics"
            )
