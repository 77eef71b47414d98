"""The task that makes a run's first checkpoint: the state before it has learnt anything."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.diffusion.sampling import sampler_digest
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.store.checkpoints import commit_checkpoint, find_checkpoint
from ddpo.store.manifests import Ref
from ddpo.training.loop import initial_state
from ddpo_workflow.tasks.adopt import adopt_checkpoint, check_adoptable
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, fresh_policy, opened


@task(name="start", task_run_name="first checkpoint", cache_policy=NO_CACHE, **STORAGE)
def start(handle: RunHandle, history: Sequence[Ref] = ()) -> Ref:
    """Commit a run's first checkpoint, or return it where it is committed.

    Args:
        handle: The run.
        history: Of a fork that rebuilds its prompt statistics: the scores of all epochs before it,
            in order.

    Returns:
        The checkpoint's manifest.

    Raises:
        PolicyMismatch: A fork's base model or sampler is not that of the saved rollouts.
        RetiredObject: Retention deleted the checkpoint that a fork starts from.
    """
    run = opened(handle)
    done = find_checkpoint(run.store, run.run_id, run.first_epoch)
    if done is not None:
        return done.ref
    with fresh_policy(run) as policy:
        sampler_of_epoch(policy, run.config, 0)  # a window without a step to train on ends here
        if run.config.fork:
            return adopt_checkpoint(run, policy, history)
        digests = {
            "policy_digest": policy.digest,
            "base_digest": policy.base_digest,
            "sampler_digest": sampler_digest(policy, run.config.sampler),
        }
        ema = run.config.optimizer.ema_decay is not None
        if ema:
            digests["ema_digest"] = digests["policy_digest"]
        return commit_checkpoint(
            run.store,
            run.run_id,
            initial_state(policy, ema=ema),
            inputs={"identity_digest": run.identity_digest},
            documents={"digests": digests},
        ).ref


@task(
    name="check fork",
    task_run_name="policy of the saved samples",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def check_fork(handle: RunHandle) -> None:
    """Refuse a fork of another base model's or sampler's samples, before any reward is asked.

    Args:
        handle: The fork.

    Raises:
        PolicyMismatch: Its base model or sampler is not that of the saved rollouts.
    """
    run = opened(handle)
    with fresh_policy(run) as policy:
        check_adoptable(run, policy)
