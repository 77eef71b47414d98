"""The task that trains: one epoch's updates, from checkpoint k to checkpoint k + 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.errors import PolicyMismatch
from ddpo.gradient import Rollouts
from ddpo.policies import policy_digest
from ddpo.run import Run
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import commit_checkpoint, load_document
from ddpo.store.manifests import Ref
from ddpo.store.tables import decode_advantages, decode_rollouts
from ddpo.store.tensors import decode_tensors
from ddpo.update import update
from tasks.progress import report
from tasks.retries import STORAGE
from tasks.worker import RunHandle, opened, policy_at


@task(name="update", task_run_name="update epoch {epoch}", cache_policy=NO_CACHE, **STORAGE)
def update_policy(
    handle: RunHandle, checkpoint: Ref, rollouts: Sequence[Ref], advantages: Ref, epoch: int
) -> Ref:
    """Run one epoch's updates and commit the next checkpoint.

    Args:
        handle: The run.
        checkpoint: The checkpoint before the epoch, which drew the rollouts.
        rollouts: The epoch's shards, in order.
        advantages: The epoch's advantages.
        epoch: The epoch.

    Returns:
        The manifest of checkpoint ``epoch + 1``.

    Raises:
        PolicyMismatch: The rollouts are of another policy or sampler.
        NonFiniteError: A loss, log-prob or gradient is NaN or infinite; nothing was committed.
    """
    run = opened(handle)
    inputs = {
        "checkpoint": checkpoint.model_dump(),
        "rollouts": [ref.model_dump() for ref in rollouts],
        "advantages": advantages.model_dump(),
    }
    key = keys.checkpoint_manifest_key(run.run_id, epoch + 1)
    done = manifests.find(run.store, key, inputs=inputs)
    if done is not None:
        return done.ref
    digests = load_document(run.store, manifests.load(run.store, checkpoint), "digests")
    drawn, sample_ids = _read_rollouts(run, rollouts, digests)
    scored = manifests.load(run.store, advantages)
    by_id = {
        row.sample_id: row.advantage
        for row in decode_advantages(run.store.get(scored.objects["advantages"]))
    }
    statistics = load_document(run.store, scored, "statistics")
    report("update", 0.0, 1.0)
    with policy_at(run, checkpoint, training=True) as lease:
        state, metrics = update(
            lease.policy,
            lease.state,
            drawn,
            torch.tensor([by_id[i] for i in sample_ids], dtype=torch.float32),
            {prompt: tuple(rewards) for prompt, rewards in statistics.items()},
            run.config,
            on_progress=lambda share: report("update", share, 1.0),
        )
        digests["policy_digest"] = policy_digest(lease.policy.base_digest, state.weights)
        if state.ema:
            digests["ema_digest"] = policy_digest(lease.policy.base_digest, state.ema)
        committed = commit_checkpoint(
            run.store,
            run.run_id,
            state,
            inputs=inputs,
            documents={"digests": digests, "metrics": metrics.document()},
        )
        if not committed.diverged:
            lease.hold(committed.ref, state)
    return committed.ref


def _read_rollouts(
    run: Run, refs: Sequence[Ref], digests: dict[str, str]
) -> tuple[Rollouts, list[str]]:
    """Read the epoch's trajectories, and refuse those of another policy or sampler."""
    rows, shards = [], []
    for ref in refs:
        manifest = manifests.load(run.store, ref)
        rows += decode_rollouts(run.store.get(manifest.objects["rollouts"]))
        shards.append(decode_tensors(run.store.get(manifest.objects["trajectories"]))[0])
    for row in rows:
        for name in ("policy_digest", "sampler_digest"):
            if getattr(row, name) != digests[name]:
                raise PolicyMismatch(
                    f"sample {row.sample_id} has {name} {getattr(row, name)}, expected "
                    f"{digests[name]}: it was drawn by another policy or sampler than the one "
                    "that is to be updated, and importance ratios would be wrong"
                )
    rollouts = Rollouts(
        prompts=[row.prompt for row in rows],
        latents=torch.cat([shard["latents"] for shard in shards]),
        log_probs=torch.cat([shard["log_probs"] for shard in shards]),
        timesteps=shards[0]["timesteps"],
    )
    return rollouts, [row.sample_id for row in rows]
