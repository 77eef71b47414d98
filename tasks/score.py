"""The task that scores one shard. Needs no model of ours: it may run anywhere."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.basics.images import decode_image
from ddpo.errors import RewardError
from ddpo.prompts import Prompt
from ddpo.rewards.scoring import score_samples
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.manifests import Committed, Ref
from ddpo.store.tables import RewardRow, decode_rewards, decode_rollouts, encode_rewards
from ddpo_workflow.tasks.prompts import remember_prompts
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened


@task(
    name="score",
    task_run_name="score epoch {epoch} shard {shard}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def score_shard(handle: RunHandle, rollouts: Ref, epoch: int, shard: int) -> Ref:
    """Score and commit one shard.

    Of a shard that a fork has adopted, the other run's scores by the same reward are taken over.

    Args:
        handle: The run.
        rollouts: The shard's manifest.
        epoch: The epoch.
        shard: The shard.

    Returns:
        The scores' manifest.

    Raises:
        RewardError: The reward is broken or away; or it could not score a sample, and the config
            wants the shard to fail then.
    """
    run = opened(handle)
    key, inputs = _identity(run, rollouts, epoch, shard)
    done = manifests.find(run.store, key, inputs=inputs)
    done = done or _adopted_scores(run, rollouts, epoch, shard)
    return (done or score_rollouts(run, rollouts, epoch, shard)).ref


def _identity(run: Run, rollouts: Ref, epoch: int, shard: int) -> tuple[str, dict[str, Any]]:
    """Return the manifest key of a shard's scores, and what they are made from."""
    identity = run.reward.identity
    inputs = {"rollouts": rollouts.model_dump(), "reward_digest": identity.digest}
    return keys.reward_manifest_key(identity.reward_id, run.run_id, epoch, shard), inputs


def _adopted_scores(run: Run, rollouts: Ref, epoch: int, shard: int) -> Committed | None:
    """Commit what the same reward has said of these very samples in the run that drew them.

    The table is copied: unlike rollouts, scores that another run lists are not spared by retention.
    """
    fork = run.config.fork
    if fork is None or not fork.adopts(epoch):
        return None
    identity = run.reward.identity
    source = keys.reward_manifest_key(identity.reward_id, fork.run_id, epoch, shard)
    drawn = manifests.load(run.store, rollouts).inputs["adopted"]
    theirs = {"rollouts": drawn, "reward_digest": identity.digest}
    scored = manifests.find(run.store, source)
    if scored is None or scored.manifest.inputs != theirs:
        return None
    if run.store.exists(keys.retired_epoch_key("samples", fork.run_id, epoch)):
        return None
    table = run.store.get(scored.manifest.objects["rewards"])
    if run.config.reward.on_failure == "fail" and any(
        row.reward is None for row in decode_rewards(table)
    ):
        return None
    stem = keys.reward_stem(identity.reward_id, run.run_id, epoch, shard)
    key, inputs = _identity(run, rollouts, epoch, shard)
    objects = {"rewards": run.store.put(stem, ".parquet", table)}
    return manifests.commit(run.store, key, kind="rewards", inputs=inputs, objects=objects)


def score_rollouts(run: Run, rollouts: Ref, epoch: int, shard: int) -> Committed:
    """Score and commit one shard, whether or not that is committed already.

    Args:
        run: The run.
        rollouts: The shard's manifest.
        epoch: The epoch.
        shard: The shard.

    Returns:
        The commit; of an earlier writer, if there was one.

    Raises:
        RewardError: The reward is broken or away; or it could not score a sample, and the config
            wants the shard to fail then.
    """
    stored = manifests.load(run.store, rollouts).objects["rollouts"]
    samples = decode_rollouts(run.store.get(stored))
    remember_prompts(rollouts, {sample.sample_id: sample.prompt for sample in samples})
    images = [decode_image(s.image_png) for s in samples]
    prompts = [Prompt(s.prompt, s.prompt_metadata) for s in samples]
    config = run.config.reward
    outcomes = score_samples(run.reward, images, prompts, tries=config.tries)
    rows = [
        RewardRow(sample.sample_id, outcome.value, outcome.status, outcome.columns)
        for sample, outcome in zip(samples, outcomes, strict=True)
    ]
    failed = [row for row in rows if row.reward is None]
    if failed and config.on_failure == "fail":
        raise RewardError(
            f"{len(failed)} of {len(rows)} samples could not be scored in {config.tries} tries, "
            f"the first {failed[0].sample_id}: {failed[0].status}. With reward.on_failure drop or "
            "impute the run goes on without them"
        )
    stem = keys.reward_stem(run.reward.identity.reward_id, run.run_id, epoch, shard)
    objects = {"rewards": run.store.put(stem, ".parquet", encode_rewards(rows))}
    key, inputs = _identity(run, rollouts, epoch, shard)
    return manifests.commit(run.store, key, kind="rewards", inputs=inputs, objects=objects)
