"""What a fork inherits from its parent: a checkpoint, saved rollouts, and their scores.

Rollouts and tensors are not copied: the fork's manifests list the parent's objects, and retention
and garbage collection leave alone what any run's manifest lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ddpo.diffusion.sampling import sampler_digest
from ddpo.errors import ConfigError, CorruptObject, MissingObject, RetiredObject
from ddpo.models import Policy, policy_digest
from ddpo.runs import Fork, Run, Scorer
from ddpo.runs.forks.checks import (
    check_policy,
    check_sampler,
    parent_checkpoint,
    saved_rollouts,
)
from ddpo.store import keys
from ddpo.store.artefacts import RolloutShard, Scores
from ddpo.store.checkpoints import TENSOR_ROLES, Checkpoint, checkpoint_objects
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, ROLLOUTS, SCORES, committed
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects
from ddpo.store.upkeep.retention import is_retired
from ddpo_workflow.tasks.statistics import statistics_of


def inherit_shard(run: Run, epoch: int, shard: int) -> Ref[RolloutShard]:
    """Commit the parent's saved shard as one of a fork's, or find it.

    Args:
        run: The fork.
        epoch: The epoch, in both runs.
        shard: The shard.

    Raises:
        ConfigError: The parent has no such shard, or its shards have another number of samples.
        RetiredObject: Retention deleted it.
    """
    parent = _fork_of(run).parent
    where = Partition(run.run_id, epoch, shard)
    if found := ROLLOUTS.find(run.store, where):
        return found  # retention spares it from its commit on, but may record the epoch as retired
    shards = saved_rollouts(parent, epoch)
    saved = shards[shard]
    adopted = ROLLOUTS.load(run.store, saved)
    _check_size(run, epoch, len(shards), len(adopted.samples()))
    objects = adopted.objects
    done = ROLLOUTS.commit(run.store, where, {"inherited": saved}, objects).ref
    # After the commit: a retirement that began before it has left its record.
    record = keys.retired_key("trajectories", parent.run_id, epoch)
    if run.store.exists(record):
        raise RetiredObject(objects["trajectories"].key, run.store.root, record)
    return done


def inherited_scores(
    run: Run, scorer: Scorer, rollouts: Ref[RolloutShard], epoch: int, shard: int
) -> Objects | None:
    """Return the parent's scores of an inherited shard by the same reward, None if there are none.

    The table is copied: unlike rollouts, scores that another run lists are not spared by retention.
    """
    fork = run.fork
    if fork is None or not fork.inherits(epoch):
        return None
    identity = scorer.reward.identity
    scores = SCORES.get(run.store, Partition(fork.parent_id, epoch, shard, identity.reward_id))
    saved = ROLLOUTS.load(run.store, rollouts).inputs["inherited"]
    if scores is None or scores.inputs != {"rollouts": saved, "reward_digest": identity.digest}:
        return None
    if run.store.exists(keys.retired_key("samples", fork.parent_id, epoch)):
        return None
    try:
        table = run.store.get(scores.objects["rewards"])
        failed = any(row.reward is None for row in scores.rows())
    except (CorruptObject, MissingObject):  # `ddpo verify` of the parent reports it
        return None
    return None if failed and scorer.config.on_failure == "fail" else {"rewards": table}


def inherit_checkpoint(run: Run, policy: Policy, scores: Sequence[Ref[Scores]]) -> Ref[Checkpoint]:
    """Commit a fork's first checkpoint: the parent's weights and optimizer, its own statistics.

    A value function is inherited if it was trained on the same reward and embeddings and statistics
    are not reset; otherwise the fork starts with a new one.

    Args:
        run: The fork.
        policy: Its model, as loaded.
        scores: The scores of all epochs before, in order, under the fork's reward; its prompt
            statistics are rebuilt from them.

    Raises:
        PolicyMismatch: The base model, the sampler, or the place of its noise differs.
        RetiredObject: Retention deleted the checkpoint.
    """
    fork = _fork_of(run)
    check_policy(fork, policy)
    check_sampler(fork)
    parent_ref = parent_checkpoint(fork)
    parent = CHECKPOINT.load(run.store, parent_ref)
    state = parent.state()
    digests = _digests(run, policy)
    digests["policy_digest"] = policy_digest(policy.base_digest, state.weights)
    tensors = {role: files for role in TENSOR_ROLES if (files := parent.files(role))}
    ema = {}
    if run.config.optimizer.ema_decay is not None:
        # An average that the parent did not keep starts at its weights.
        ema = state.shown_weights
        tensors.setdefault("ema", tensors["weights"])
        digests["ema_digest"] = policy_digest(policy.base_digest, ema)
    old = {}
    if run.config.algorithm.needs.keeps_old:
        # So do old weights, as samples of a parent that keeps none are of its trained ones.
        old = state.old_weights
        tensors.setdefault("old", tensors["weights"])
        digests["old_digest"] = policy_digest(policy.base_digest, old)
    parent_dtype = fork.parent.numerics.dtype
    value = state.value if _value_holds(run, fork, parent.digests, digests) else {}
    ref = committed(
        run.store,
        CHECKPOINT,
        Partition(run.run_id, fork.epoch),
        {
            "identity_digest": run.identity_digest,
            "inherited": parent_ref,
            "scores": list(scores),
        },
        lambda: checkpoint_objects(
            replace(
                state,
                statistics=statistics_of(run, scores),
                ema=ema,
                value=value,
                old=old,
                loss_scale=state.loss_scale if run.numerics.dtype == parent_dtype else None,
            ),
            digests,
            inherited=tensors,
        ),
    )
    if is_retired(run.store, fork.parent_id, fork.epoch):
        record = keys.retired_key("checkpoints", fork.parent_id, fork.epoch)
        raise RetiredObject(parent_ref.key, run.store.root, record)
    return ref


def _check_size(run: Run, epoch: int, shards: int, samples: int) -> None:
    """Refuse saved samples that are not as many as the fork's own would be.

    Args:
        run: The fork.
        epoch: The epoch.
        shards: Number of saved shards.
        samples: Number of samples in one of them.
    """
    expected = run.shards_per_epoch, run.config.rollouts.shard_size
    if (shards, samples) != expected:
        raise ConfigError(
            f"epoch {epoch} of run {_fork_of(run).parent_id!r} has {shards} shards of {samples} "
            f"samples, but the fork {run.run_id!r} expects {expected[0]} of {expected[1]}. Start "
            "another fork, with the parent's rollouts.samples_per_epoch and rollouts.shard_size"
        )


def _fork_of(run: Run) -> Fork:
    if run.fork is None:
        raise ValueError(f"run {run.run_id!r} is not a fork")
    return run.fork


def _digests(run: Run, policy: Policy) -> dict[str, str]:
    return {
        "base_digest": policy.base_digest,
        "sampler_digest": sampler_digest(policy, run.config.sampler),
    }


def _value_holds(
    run: Run, fork: Fork, of_rollouts: dict[str, str], digests: dict[str, str]
) -> bool:
    """Return whether the parent's value function applies to a fork's rewards.

    It predicts one specific reward from one text encoder's embeddings.
    """
    if not run.config.algorithm.has_value_function or fork.settings.statistics == "reset":
        return False
    # By digest: the code, the weights or the service behind a name may have changed.
    same_reward = run.reward_digest == fork.parent.reward_digest
    return same_reward and of_rollouts["base_digest"] == digests["base_digest"]
