"""The task that makes checkpoint 0: the state before anything was learnt."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.sampling import sampler_digest
from ddpo.store.checkpoints import commit_checkpoint, find_checkpoint
from ddpo.store.manifests import Ref
from ddpo.update import initial_state
from ddpo.window import sampler_of_epoch
from tasks.retries import STORAGE
from tasks.worker import RunHandle, fresh_policy, opened


@task(name="start", task_run_name="checkpoint 0", cache_policy=NO_CACHE, **STORAGE)
def start(handle: RunHandle) -> Ref:
    """Commit checkpoint 0, or return it where it is committed.

    Args:
        handle: The run.

    Returns:
        The checkpoint's manifest.
    """
    run = opened(handle)
    done = find_checkpoint(run.store, run.run_id, 0)
    if done is not None:
        return done.ref
    with fresh_policy(run) as policy:
        sampler_of_epoch(policy, run.config, 0)  # a window without a step to train on ends here
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
