"""The task that makes a run's first checkpoint: the state before any training."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.diffusion.sampling import sampler_digest
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.store.artefacts import Scores
from ddpo.store.checkpoints import Checkpoint, checkpoint_objects
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, committed
from ddpo.store.manifests import Ref
from ddpo.training.loop import initial_state
from ddpo_workflow.tasks.engines import on_device
from ddpo_workflow.tasks.inherit import inherit_checkpoint
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, fresh_policy, opened


@task(name="start", task_run_name="first checkpoint", cache_policy=NO_CACHE, **STORAGE)
def start(handle: RunHandle, history: Sequence[Ref[Scores]] = ()) -> Ref[Checkpoint]:
    """Commit a run's first checkpoint, or find it.

    Args:
        handle: The run.
        history: If a fork rebuilds its prompt statistics: the scores of all epochs before it, in
            order.

    Raises:
        PolicyMismatch: A fork's base model or sampler is not that of the saved rollouts.
        RetiredObject: Retention deleted the checkpoint that a fork starts from.
    """
    return on_device(_started, handle, list(history))


def _started(handle: RunHandle, history: Sequence[Ref[Scores]]) -> Ref[Checkpoint]:
    run = opened(handle)
    where = Partition(run.run_id, run.first_epoch)
    if found := CHECKPOINT.find(run.store, where):
        return found
    with fresh_policy(run) as policy:
        sampler_of_epoch(policy, run.config, 0)  # refuses a window without a step to train
        if run.fork:
            return inherit_checkpoint(run, policy, history)
        pictures = run.config.tracking.pictures.prompts
        policy.warn_of_cut([*(prompt.text for prompt in run.prompts), *pictures])
        digests = {
            "policy_digest": policy.digest,
            "base_digest": policy.base_digest,
            "sampler_digest": sampler_digest(policy, run.config.sampler),
        }
        ema = run.config.optimizer.ema_decay is not None
        old = run.config.algorithm.needs.keeps_old
        if ema:
            digests["ema_digest"] = digests["policy_digest"]
        if old:
            digests["old_digest"] = digests["policy_digest"]
        return committed(
            run.store,
            CHECKPOINT,
            where,
            {"identity_digest": run.identity_digest},
            lambda: checkpoint_objects(initial_state(policy, ema=ema, old=old), digests),
        )
