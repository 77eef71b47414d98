"""What a fork takes over from the run that it branches off: a checkpoint, and saved rollouts.

Nothing is copied: the fork's manifests list the other run's objects, and retention and garbage
collection leave alone what any run's manifest lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ddpo.algorithms.advantages import compute_advantages
from ddpo.config import ForkConfig, RunConfig, ValueAdvantages
from ddpo.digests import canonical_json
from ddpo.errors import ConfigError, PolicyMismatch, RetiredObject, RewardError
from ddpo.policies import Policy, policy_digest
from ddpo.run import Run, open_run
from ddpo.sampling import sampler_digest
from ddpo.state import PromptStatistics
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import (
    TENSOR_ROLES,
    find_checkpoint,
    load_checkpoint,
    load_document,
)
from ddpo.store.manifests import Committed, Manifest, Ref
from ddpo.store.retention import is_retired
from ddpo.store.tables import decode_prompts, decode_rewards


def saved_rollouts(run: Run, epoch: int) -> list[Ref]:
    """Return the manifests of a committed epoch's rollouts.

    Args:
        run: The run.
        epoch: The epoch.

    Returns:
        One a shard, in order.

    Raises:
        ConfigError: The epoch is not committed.
        RetiredObject: Retention deleted its samples.
    """
    rollouts = committed_rollouts(run, epoch)
    retired = keys.retired_epoch_key("samples", run.run_id, epoch)
    if run.store.exists(retired):
        raise RetiredObject(
            f"the samples of epoch {epoch} of run {run.run_id!r}", run.store.root, retired
        )
    return rollouts


def committed_rollouts(run: Run, epoch: int) -> list[Ref]:
    """Return the manifests of a committed epoch's rollouts, whether or not they are retired.

    Args:
        run: The run.
        epoch: The epoch.

    Returns:
        One a shard, in order.

    Raises:
        ConfigError: The epoch is not committed.
    """
    commit = manifests.find(run.store, keys.epoch_manifest_key(run.run_id, epoch))
    if commit is None:
        raise ConfigError(
            f"run {run.run_id!r} has not committed epoch {epoch}: there are no saved rollouts of it"
        )
    return [Ref.model_validate(ref) for ref in _listed(commit.manifest, "rollouts")]


def epochs_before(run: Run, fork: ForkConfig) -> Iterator[tuple[Run, int]]:
    """Yield the epochs whose rewards a fork's prompt statistics are rebuilt from, the first first.

    Those whose updates are behind its checkpoint, back to where a run among them reset its own.

    Args:
        run: The fork, or any run of its store.
        fork: Where it branches off.

    Yields:
        The run that an epoch belongs to, and the epoch.
    """
    parent = open_run(run.store, fork.run_id)
    if parent.config.fork and parent.config.fork.statistics == "rebuild":
        yield from epochs_before(run, parent.config.fork)
    for epoch in range(parent.first_epoch, fork.epoch):
        yield parent, epoch


def check_windows(config: RunConfig, parent: Run) -> None:
    """Refuse rollouts whose noise is in other windows than those that a fork would train.

    A sampler's digest does not tell: of a window that is drawn for each epoch the seed says where.

    Args:
        config: The fork's.
        parent: The run that it branches off.

    Raises:
        PolicyMismatch: The seed placed the noise elsewhere.
    """
    window = config.sampler.window
    if window is None or not window.noise_only_there or window.position != "random":
        return
    seed = parent.config.seed
    if seed != config.seed:
        raise PolicyMismatch(
            f"the saved rollouts of run {parent.run_id!r} have noise in windows that seed {seed} "
            f"placed, and a fork with seed {config.seed} would train other steps, which were "
            "taken without noise. Leave the seed as it is, or start a run of its own"
        )


def adopt_shard(run: Run, epoch: int, shard: int) -> Committed:
    """Commit another run's saved shard as one of a fork's, or find it.

    Args:
        run: The fork.
        epoch: The epoch, in both runs.
        shard: The shard.

    Returns:
        The commit.

    Raises:
        ConfigError: The other run has no such shard.
        RetiredObject: Retention deleted it.
    """
    assert run.config.fork is not None
    key = keys.rollout_manifest_key(run.run_id, epoch, shard)
    if found := manifests.find(run.store, key):
        return found  # from then on retention spares it, and may record the epoch as retired
    parent = open_run(run.store, run.config.fork.run_id)
    saved = saved_rollouts(parent, epoch)[shard]
    manifest = manifests.load(run.store, saved)
    inputs = {"adopted": saved.model_dump()}
    done = manifests.commit(
        run.store, key, kind="rollouts", inputs=inputs, objects=manifest.objects
    )
    # After the commit: a retirement that began before it has left its record.
    record = keys.retired_epoch_key("trajectories", parent.run_id, epoch)
    if run.store.exists(record):
        raise RetiredObject(manifest.objects["trajectories"].key, run.store.root, record)
    return done


def adopt_checkpoint(run: Run, policy: Policy, scores: Sequence[Ref]) -> Ref:
    """Commit a fork's first checkpoint: another run's weights and optimizer, statistics of its own.

    A value function is taken over where it was learnt of the same reward and embeddings, and
    statistics are not reset; elsewhere the fork starts with a new one.

    Args:
        run: The fork.
        policy: Its model, as loaded.
        scores: Of all epochs before, in order, under this fork's reward; what its prompt
            statistics are rebuilt from.

    Returns:
        The checkpoint's manifest.

    Raises:
        PolicyMismatch: The base model, the sampler, or the place of its noise is another.
        RetiredObject: Retention deleted the checkpoint.
    """
    fork = run.config.fork
    assert fork is not None
    parent = find_checkpoint(run.store, fork.run_id, fork.epoch)
    if parent is None:
        raise ConfigError(f"run {fork.run_id!r} has no checkpoint {fork.epoch}")
    state = load_checkpoint(run.store, parent.ref)
    digests = load_document(run.store, parent.manifest, "digests")
    own = {
        "base_digest": policy.base_digest,
        "sampler_digest": sampler_digest(policy, run.config.sampler),
        "policy_digest": policy_digest(policy.base_digest, state.weights),
    }
    _check_same(fork, digests, own)
    check_windows(run.config, open_run(run.store, fork.run_id))
    statistics = _statistics(run, scores)
    progress = {
        "epoch": state.epoch,
        "updates": state.updates,
        "samples": state.samples,
        "statistics": {prompt: list(rewards) for prompt, rewards in statistics.items()},
    }
    shared = set(TENSOR_ROLES)
    if not _value_holds(run, fork, digests, own):
        shared -= {"value"}
    objects = {role: stored for role, stored in parent.manifest.objects.items() if role in shared}
    if run.config.optimizer.ema_decay is None:
        objects.pop("ema", None)
    else:
        # An average that the other run did not keep begins at its weights.
        objects.setdefault("ema", objects["weights"])
        own["ema_digest"] = policy_digest(policy.base_digest, state.shown_weights)
    for role, document in (("progress", progress), ("digests", own)):
        stem = keys.checkpoint_stem(run.run_id, fork.epoch, role)
        objects[role] = run.store.put(stem, ".json", canonical_json(document))
    done = manifests.commit(
        run.store,
        keys.checkpoint_manifest_key(run.run_id, fork.epoch),
        kind="checkpoint",
        inputs={
            "identity_digest": run.identity_digest,
            "adopted": parent.ref.model_dump(),
            "scores": [ref.model_dump() for ref in scores],
        },
        objects=objects,
    )
    if is_retired(run.store, fork.run_id, fork.epoch):
        record = keys.retired_checkpoint_key(fork.run_id, fork.epoch)
        raise RetiredObject(parent.ref.key, run.store.root, record)
    return done.ref


def _value_holds(
    run: Run, fork: ForkConfig, of_rollouts: dict[str, str], own: dict[str, str]
) -> bool:
    """Tell whether the other run's value function says anything of a fork's rewards.

    It foretells one reward from one text encoder's embeddings. Else the fork starts with a new one.
    """
    if not isinstance(run.config.advantages, ValueAdvantages) or fork.statistics == "reset":
        return False
    mine, theirs = run.config.reward, open_run(run.store, fork.run_id).config.reward
    same_reward = (mine.name, mine.parameters) == (theirs.name, theirs.parameters)
    return same_reward and of_rollouts["base_digest"] == own["base_digest"]


def _listed(manifest: Manifest, name: str) -> list[Any]:
    found = manifest.inputs[name]
    assert isinstance(found, list)
    return found


def _check_same(fork: ForkConfig, of_rollouts: dict[str, str], own: dict[str, str]) -> None:
    """Refuse rollouts of another policy or sampler than the fork's, before anything is trained."""
    for name, meaning in (
        ("sampler_digest", "sampler (steps, eta, guidance, resolution, dtype, scheduler)"),
        ("base_digest", "base model"),
    ):
        if of_rollouts[name] == own[name] or (fork.off_policy and name == "base_digest"):
            continue
        raise PolicyMismatch(
            f"the saved rollouts of run {fork.run_id!r} are of another {meaning} than this fork's: "
            f"{name} {of_rollouts[name]}, expected {own[name]}. Leave those settings as they are, "
            "or start a run of its own; another base model's rollouts are trained on with "
            "fork.off_policy: true"
        )


def _statistics(run: Run, scores: Sequence[Ref]) -> PromptStatistics:
    """Fold the scores of the epochs before, as a run with this config would have.

    Shards of one epoch follow each other; their manifests' keys name run and epoch.
    """
    by_epoch: dict[str, list[Ref]] = {}
    for ref in scores:
        by_epoch.setdefault(ref.key.rpartition("/")[0], []).append(ref)
    statistics: PromptStatistics = {}
    for refs in by_epoch.values():
        prompts, rewards = _scored_samples(run, refs)
        try:
            batch = compute_advantages(run.config.advantages, statistics, prompts, rewards)
        except RewardError:  # not one sample of that epoch could be scored
            continue
        statistics = batch.statistics
    return statistics


def _scored_samples(run: Run, refs: Sequence[Ref]) -> tuple[list[str], np.ndarray]:
    """Return prompts and rewards (NaN where there is none) of an epoch, ordered by sample_id."""
    prompts: dict[str, str] = {}
    rewards: dict[str, float] = {}
    for ref in refs:
        manifest = manifests.load(run.store, ref)
        source = manifests.load(run.store, Ref.model_validate(manifest.inputs["rollouts"]))
        prompts |= decode_prompts(run.store.get(source.objects["rollouts"]))
        for row in decode_rewards(run.store.get(manifest.objects["rewards"])):
            rewards[row.sample_id] = float("nan") if row.reward is None else row.reward
    ids = sorted(prompts)
    return [prompts[i] for i in ids], np.asarray([rewards[i] for i in ids], dtype=np.float64)
