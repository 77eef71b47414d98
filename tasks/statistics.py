"""The task that rebuilds prompt statistics from the scores of the epochs before a fork."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.algorithms.base import PromptStatistics, Scored
from ddpo.config import RewardConfig
from ddpo.errors import RewardError
from ddpo.runs import Run
from ddpo.store.artefacts import Scores
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS, SCORES, STATISTICS, committed
from ddpo.store.manifests import Ref
from ddpo.store.statistics import Statistics, encode_statistics
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened, scorer_of


@task(
    name="statistics",
    task_run_name="prompt statistics before epoch {epoch}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def rebuild_statistics(
    handle: RunHandle, scores: Sequence[Ref[Scores]], epoch: int, reward: RewardConfig
) -> Ref[Statistics]:
    """Rebuild and commit a rescored fork's prompt statistics before its first epoch, or find them.

    Args:
        handle: The fork.
        scores: The scores of all epochs before, in order, under the new reward.
        epoch: The fork's first epoch.
        reward: The new reward.
    """
    run = opened(handle)
    return committed(
        run.store,
        STATISTICS,
        Partition(run.run_id, epoch - 1, reward_id=scorer_of(run, reward).reward_id),
        {"scores": list(scores)},
        lambda: {"statistics": encode_statistics(statistics_of(run, scores))},
    )


def statistics_of(run: Run, scores: Sequence[Ref[Scores]]) -> PromptStatistics:
    """Return the prompt statistics that a run has after epochs with these scores.

    Args:
        run: The run, whose algorithm limits the number of rewards kept per prompt.
        scores: The scores, those of one epoch of one run next to each other.

    Returns:
        Rewards by prompt, the oldest first.
    """
    statistics: PromptStatistics = {}
    for _, refs in itertools.groupby(scores, key=_epoch_of):
        prompts, rewards = _scored_samples(run, refs)
        try:
            credit = run.config.algorithm.credit(Scored(prompts, rewards), statistics)
        except RewardError:  # no sample of that epoch could be scored
            continue
        statistics = credit.statistics
    return statistics


def _epoch_of(ref: Ref[Scores]) -> Partition | None:
    where = SCORES.parse(ref.key)
    return where and where.of_shard(None)


def _scored_samples(run: Run, refs: Iterable[Ref[Scores]]) -> tuple[list[str], np.ndarray]:
    """Return prompts and rewards (NaN where there is none) of an epoch, ordered by sample_id."""
    prompts: dict[str, str] = {}
    rewards: dict[str, float] = {}
    for ref in refs:
        scores = SCORES.load(run.store, ref)
        samples = ROLLOUTS.load(run.store, scores.rollouts).samples()
        prompts |= {sample.sample_id: sample.prompt for sample in samples}
        for row in scores.rows():
            rewards[row.sample_id] = float("nan") if row.reward is None else row.reward
    ids = sorted(prompts)
    return [prompts[i] for i in ids], np.asarray([rewards[i] for i in ids], dtype=np.float64)
