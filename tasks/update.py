"""The task that trains: one epoch's updates, from checkpoint k to checkpoint k + 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.config import Regression
from ddpo.errors import PolicyMismatch
from ddpo.models import policy_digest
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import commit_checkpoint, load_document
from ddpo.store.manifests import Ref
from ddpo.store.tables import AdvantageRow, decode_advantages, decode_rollouts
from ddpo.store.tensors import decode_tensors
from ddpo.training.denoising import FinalLatents, RegressionMetrics, regress
from ddpo.training.loop import UpdateMetrics, update
from ddpo.training.pairs import Rollouts
from ddpo.training.state import TrainState
from ddpo_workflow.tasks.progress import report
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import Lease, RunHandle, opened, policy_at


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
    drawn = _read_rollouts(run, rollouts, digests, epoch)
    scored = manifests.load(run.store, advantages)
    rows = decode_advantages(run.store.get(scored.objects["advantages"]))
    statistics = load_document(run.store, scored, "statistics")
    report("update", 0.0, 1.0)
    with policy_at(run, checkpoint, training=True) as lease:
        state, metrics = _updated(run, lease, drawn, rows, statistics)
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


@dataclass(frozen=True)
class _Drawn:
    """The samples of an epoch, in the order of ``sample_id``, and what their shards hold."""

    sample_ids: list[str]
    prompts: list[str]
    tensors: dict[str, torch.Tensor]


def _updated(
    run: Run,
    lease: Lease,
    drawn: _Drawn,
    rows: Sequence[AdvantageRow],
    statistics: dict[str, list[float]],
) -> tuple[TrainState, UpdateMetrics | RegressionMetrics]:
    """Update the leased policy by the run's algorithm."""
    by_id = {row.sample_id: row for row in rows}
    after = {prompt: tuple(rewards) for prompt, rewards in statistics.items()}
    own = [by_id[sample_id] for sample_id in drawn.sample_ids]

    def on_progress(share: float) -> None:
        report("update", share, 1.0)

    if isinstance(run.config.algorithm, Regression):
        finals = FinalLatents(drawn.prompts, drawn.tensors["latents"][:, -1])
        weights = torch.tensor([row.weight for row in own], dtype=torch.float32)
        return regress(
            lease.policy,
            lease.state,
            finals,
            weights,
            after,
            run.config,
            on_progress=on_progress,
        )
    rollouts = Rollouts(
        prompts=drawn.prompts,
        latents=drawn.tensors["latents"],
        log_probs=drawn.tensors["log_probs"],
        timesteps=drawn.tensors["timesteps"],
    )
    return update(
        lease.policy,
        lease.state,
        rollouts,
        torch.tensor([row.advantage for row in own], dtype=torch.float32),
        after,
        run.config,
        scored=torch.tensor([row.reward is not None for row in own]),
        on_progress=on_progress,
    )


def _read_rollouts(run: Run, refs: Sequence[Ref], digests: dict[str, str], epoch: int) -> _Drawn:
    """Read the epoch's trajectories, and refuse those of another policy or sampler."""
    fork = run.config.fork
    off_policy = fork is not None and fork.off_policy and fork.adopts(epoch)
    rows, shards = [], []
    for ref in refs:
        manifest = manifests.load(run.store, ref)
        rows += decode_rollouts(run.store.get(manifest.objects["rollouts"]))
        shards.append(decode_tensors(run.store.get(manifest.objects["trajectories"]))[0])
    for row in rows:
        for name in ("policy_digest", "sampler_digest"):
            if name == "policy_digest" and off_policy:
                continue
            if getattr(row, name) != digests[name]:
                raise PolicyMismatch(
                    f"sample {row.sample_id} has {name} {getattr(row, name)}, expected "
                    f"{digests[name]}: it was drawn by another policy or sampler than the one "
                    "that is to be updated, and importance ratios would be wrong. In a fork, "
                    "off_policy: true trains on another policy's all the same"
                )
    tensors = {
        name: value if name == "timesteps" else torch.cat([shard[name] for shard in shards])
        for name, value in shards[0].items()
    }
    return _Drawn([row.sample_id for row in rows], [row.prompt for row in rows], tensors)
