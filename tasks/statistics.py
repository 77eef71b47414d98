"""The task that rebuilds prompt statistics from the scores of the epochs before a fork."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.algorithms.base import PromptStatistics, Scored
from ddpo.basics.digests import canonical_json
from ddpo.errors import RewardError
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.manifests import Ref
from ddpo.store.tables import decode_rewards
from ddpo_workflow.tasks.prompts import prompts_of
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened


@task(
    name="statistics",
    task_run_name="prompt statistics before epoch {epoch}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def rebuild_statistics(handle: RunHandle, scores: Sequence[Ref], epoch: int) -> Ref:
    """Commit what a rescored fork's prompt statistics are before its first epoch, or find it.

    Args:
        handle: The fork, under the new reward.
        scores: Of all epochs before, in order, under that reward.
        epoch: The fork's first epoch.

    Returns:
        The statistics' manifest.
    """
    run = opened(handle)
    reward_id = run.reward.identity.reward_id
    statistics = statistics_of(run, scores)
    remembered = {prompt: list(rewards) for prompt, rewards in statistics.items()}
    stem = keys.statistics_stem(reward_id, run.run_id, epoch - 1)
    return manifests.commit(
        run.store,
        keys.statistics_manifest_key(reward_id, run.run_id, epoch - 1),
        kind="statistics",
        inputs={"scores": [ref.model_dump() for ref in scores]},
        objects={"statistics": run.store.put(stem, ".json", canonical_json(remembered))},
    ).ref


def statistics_of(run: Run, scores: Sequence[Ref]) -> PromptStatistics:
    """Fold the scores of epochs, as a run with this config would have.

    Args:
        run: Its config says how many rewards a prompt remembers.
        scores: Manifests of scored shards. Those of one epoch follow each other; their keys name
            run and epoch.

    Returns:
        Rewards by prompt, the oldest first.
    """
    by_epoch: dict[str, list[Ref]] = {}
    for ref in scores:
        by_epoch.setdefault(ref.key.rpartition("/")[0], []).append(ref)
    statistics: PromptStatistics = {}
    for refs in by_epoch.values():
        prompts, rewards = _scored_samples(run, refs)
        try:
            credit = run.config.algorithm.credit(Scored(prompts, rewards), statistics)
        except RewardError:  # not one sample of that epoch could be scored
            continue
        statistics = credit.statistics
    return statistics


def _scored_samples(run: Run, refs: Sequence[Ref]) -> tuple[list[str], np.ndarray]:
    """Return prompts and rewards (NaN where there is none) of an epoch, ordered by sample_id."""
    prompts: dict[str, str] = {}
    rewards: dict[str, float] = {}
    for ref in refs:
        manifest = manifests.load(run.store, ref)
        prompts |= prompts_of(run, Ref.model_validate(manifest.inputs["rollouts"]))
        for row in decode_rewards(run.store.get(manifest.objects["rewards"])):
            rewards[row.sample_id] = float("nan") if row.reward is None else row.reward
    ids = sorted(prompts)
    return [prompts[i] for i in ids], np.asarray([rewards[i] for i in ids], dtype=np.float64)
