"""What a fork takes over from the run that it branches off: a checkpoint, and saved rollouts.

Nothing is copied: the fork's manifests list the other run's objects, and retention and garbage
collection leave alone what any run's manifest lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo.basics.digests import canonical_json
from ddpo.config import ForkConfig
from ddpo.diffusion.sampling import sampler_digest
from ddpo.errors import ConfigError, RetiredObject
from ddpo.models import Policy, policy_digest
from ddpo.runs.forks.checks import check_policy, check_sampler, saved_rollouts
from ddpo.runs.run import Run, open_run
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import TENSOR_ROLES, find_checkpoint, load_checkpoint, load_document
from ddpo.store.manifests import Committed, Ref
from ddpo.store.upkeep.retention import is_retired
from ddpo_workflow.tasks.statistics import statistics_of


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
    check_adoptable(run, policy)
    parent = _checkpoint_of(run, fork)
    state = load_checkpoint(run.store, parent.ref)
    digests = load_document(run.store, parent.manifest, "digests")
    own = _digests(run, policy)
    own["policy_digest"] = policy_digest(policy.base_digest, state.weights)
    statistics = statistics_of(run, scores)
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


def check_adoptable(run: Run, policy: Policy) -> None:
    """Refuse a fork whose saved rollouts are not of its own base model and sampler.

    Args:
        run: The fork.
        policy: Its model, as loaded.

    Raises:
        ConfigError: The other run has no such checkpoint.
        PolicyMismatch: The base model, the sampler, or the place of its noise is another.
    """
    fork = run.config.fork
    assert fork is not None
    of_rollouts = load_document(run.store, _checkpoint_of(run, fork).manifest, "digests")
    check_policy(fork, of_rollouts, _digests(run, policy))
    check_sampler(run.config, open_run(run.store, fork.run_id))


def _checkpoint_of(run: Run, fork: ForkConfig) -> Committed:
    found = find_checkpoint(run.store, fork.run_id, fork.epoch)
    if found is None:
        raise ConfigError(f"run {fork.run_id!r} has no checkpoint {fork.epoch}")
    return found


def _digests(run: Run, policy: Policy) -> dict[str, str]:
    return {
        "base_digest": policy.base_digest,
        "sampler_digest": sampler_digest(policy, run.config.sampler),
    }


def _value_holds(
    run: Run, fork: ForkConfig, of_rollouts: dict[str, str], own: dict[str, str]
) -> bool:
    """Tell whether the other run's value function says anything of a fork's rewards.

    It foretells one reward from one text encoder's embeddings. Else the fork starts with a new one.
    """
    if not run.config.algorithm.has_value_function or fork.statistics == "reset":
        return False
    # By digest: the code, the weights or the service behind a name may have been exchanged.
    theirs = open_run(run.store, fork.run_id).pinned_reward
    same_reward = theirs is not None and run.pinned_reward == theirs
    return same_reward and of_rollouts["base_digest"] == own["base_digest"]
