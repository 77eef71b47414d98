"""A new run from another's checkpoint and saved samples: the night goes on under a new reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ddpo.config import RunConfig
from ddpo.config.files import apply_overrides, parse_config
from ddpo.config.s3 import S3Options
from ddpo.errors import ConfigError
from ddpo.rewards import load_reward
from ddpo.runs.forks.checks import check_kept, check_on_policy, check_sampler, committed_rollouts
from ddpo.runs.run import Run, open_run, start_run, storage_root
from ddpo.store import keys
from ddpo.store.objects import Store
from ddpo_workflow.flows.flow import ddpo_flow
from ddpo_workflow.flows.train import Parameters, Text, Whole, train_run

Statistics = Literal["rebuild", "reset"]


@ddpo_flow(name="ddpo-fork", run_name="{run_id} from epoch {epoch}")
def fork(
    run_id: str,
    epoch: int,
    reward: Text = None,
    parameters: Parameters = None,
    fork_id: Text = None,
    epochs: Whole = None,
    statistics: Statistics = "rebuild",
    overrides: Sequence[str] = (),
    storage: Text = None,
) -> str:
    """Branch a run off another one's checkpoint, on samples that are saved.

    Args:
        run_id: The run to branch off.
        epoch: Its checkpoint before this epoch is the start; this epoch's samples are not drawn
            again.
        reward: Name of the new reward. Empty: the same.
        parameters: The new reward's.
        fork_id: The new run's name. Empty: made of the other's, the epoch and the reward; one that
            exists goes on.
        epochs: How many epochs it is to have in the end, those before the fork counted. Empty: as
            many as the other.
        statistics: Prompt statistics are rebuilt by scoring the epochs before, or reset.
        overrides: Any other setting, one an item, as `optimizer.learning_rate=1e-4`.
        storage: Folder or URL that remembers the run. Empty: the worker's DDPO_ROOT, or the local
            store.

    Returns:
        The new run's name.
    """
    parent = open_run(Store.open(storage_root(storage)), run_id)
    config = forked_config(
        parent,
        epoch,
        reward=reward,
        parameters=parameters,
        epochs=epochs,
        statistics=statistics,
        overrides=overrides,
    )
    fork_id = named_fork(parent, config, fork_id)
    train_run(start_run(config, fork_id))
    return fork_id


def forked_config(
    parent: Run,
    epoch: int,
    *,
    reward: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    statistics: Statistics = "rebuild",
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Return the config of a fork: the other run's, and what is asked to differ.

    Args:
        parent: The run to branch off.
        epoch: Where.
        reward: The new reward's name; by default the same reward.
        parameters: Its parameters.
        epochs: Epochs in the end.
        statistics: As in :func:`fork`.
        overrides: Other settings, as `a.b=value`.

    Returns:
        The config.

    Raises:
        ConfigError: The other run has no such epoch, or something must not differ.
        PolicyMismatch: Its samples are of another sampler.
    """
    if parameters and reward is None:
        raise ConfigError(
            f"parameters {', '.join(parameters)} belong to a reward, and none is named; name one, "
            f"such as {parent.config.reward.name}, that of {parent.run_id!r}"
        )
    saved = committed_rollouts(parent, epoch)
    raw: dict[str, Any] = {**parent.config.identity(), **parent.config.operation()}
    raw["numerics"] = parent.config.numerics.model_dump(mode="json")
    # As the store was found now, and not as an earlier start was told.
    s3 = (parent.store.s3 or S3Options()).model_dump(mode="json")
    raw["storage"] |= {"root": parent.store.root, "s3": s3}
    raw["tracking"].pop("parent", None)  # a fork is shown below the run that it branches off
    if reward is not None:
        raw["reward"] |= {"name": reward, "parameters": dict(parameters or {})}
    if epochs is not None:
        raw["epochs"] = epochs
    raw["fork"] = {"run_id": parent.run_id, "epoch": epoch, "statistics": statistics}
    apply_overrides(raw, overrides)
    config = parse_config(raw, f"a fork of {parent.run_id} at epoch {epoch}")
    rollouts = config.rollouts
    shards = rollouts.samples_per_epoch // rollouts.shard_size
    wrong = [
        f"{name} is {mine}, and the saved samples have {theirs}"
        for name, mine, theirs in (
            ("trainable", config.trainable, parent.config.trainable),
            ("rollouts.shard_size", rollouts.shard_size, parent.config.rollouts.shard_size),
            (
                "rollouts.samples_per_prompt",
                rollouts.samples_per_prompt,
                parent.config.rollouts.samples_per_prompt,
            ),
            ("the number of shards", shards, len(saved)),
        )
        if mine != theirs
    ]
    if wrong:
        raise ConfigError(f"a fork of {parent.run_id} cannot start: {'; '.join(wrong)}")
    if (parent.config.stored_trajectories, config.stored_trajectories) == ("final", "full"):
        raise ConfigError(
            f"a fork of {parent.run_id} cannot start: {config.algorithm.type} trains on all steps, "
            f"and {parent.config.algorithm.type} saved clean latents alone. Start a run of its own"
        )
    check_sampler(config, parent)
    return config


def named_fork(parent: Run, config: RunConfig, fork_id: str | None) -> str:
    """Return a fork's name, once it is sure that it can begin, or has begun.

    One that exists has adopted what it was to adopt, or retention spares it.

    Args:
        parent: The run to branch off.
        config: The fork's.
        fork_id: Its name; by default one made of the run's, the epoch, and the reward if that is
            another.

    Returns:
        The name.

    Raises:
        DdpoError: It is new, and something that it would begin with is gone, or of another policy
            (`check_kept`, `check_on_policy`).
    """
    name = fork_id or _fork_name(parent, config)
    if not parent.store.exists(keys.run_key(name)):
        check_kept(config, parent)
        check_on_policy(config, parent)
    return name


def _fork_name(parent: Run, config: RunConfig) -> str:
    assert config.fork is not None
    name = f"{parent.run_id}-from-{config.fork.epoch}"
    identity = load_reward(config.reward.name, config.reward.parameters).identity
    same = identity.digest == parent.pinned_reward
    return name if same else f"{name}-{identity.reward_id}"
