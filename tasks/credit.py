"""The task that turns an epoch's scores into credit: advantages, weights, or pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.algorithms.base import PromptStatistics, Scored, ScoredPart
from ddpo.analysis.rewards import summarize
from ddpo.basics.randomness import derive_seed
from ddpo.config import RewardConfig
from ddpo.errors import ConfigError
from ddpo.rewards.base import group_weights
from ddpo.runs import Run, Scorer
from ddpo.store.artefacts import AdvantageTable, RolloutShard, Scores
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, ROLLOUTS, SCORES, committed, open_ref
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects
from ddpo.store.statistics import HoldsStatistics, encode_statistics
from ddpo.store.tables import AdvantageRow, RewardRow, encode_advantages
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened, scorer_of

_logger = logging.getLogger(__name__)


@task(name="advantages", task_run_name="advantages epoch {epoch}", cache_policy=NO_CACHE, **STORAGE)
def credit_of(
    handle: RunHandle,
    before: Ref[HoldsStatistics],
    rollouts: Sequence[Ref[RolloutShard]],
    scores: Sequence[Ref[Scores]],
    epoch: int,
    reward: RewardConfig | None = None,
) -> Ref[AdvantageTable]:
    """Commit the credit of an epoch's samples, and the prompt statistics after them.

    Args:
        handle: The run.
        before: Holds the statistics so far: the checkpoint before the epoch; or, where samples are
            rescored, the credit of the epoch before it.
        rollouts: The epoch's shards, in order.
        scores: Their scores, in order.
        epoch: The epoch.
        reward: The reward of the scores; by default the run's own.

    Raises:
        RewardError: No sample has a reward.
    """
    run = opened(handle)
    return committed_credit(run, scorer_of(run, reward), before, rollouts, scores, epoch)


def committed_credit(
    run: Run,
    scorer: Scorer,
    before: Ref[HoldsStatistics],
    rollouts: Sequence[Ref[RolloutShard]],
    scores: Sequence[Ref[Scores]],
    epoch: int,
) -> Ref[AdvantageTable]:
    """Return an epoch's credit; compute and commit it if there is none. See `credit_of`."""
    return committed(
        run.store,
        ADVANTAGES,
        Partition(run.run_id, epoch, reward_id=scorer.reward_id),
        {"checkpoint": before, "rollouts": list(rollouts), "rewards": list(scores)},
        lambda: _computed(run, scorer, before, rollouts, scores, epoch),
    )


def _computed(
    run: Run,
    scorer: Scorer,
    before: Ref[HoldsStatistics],
    rollouts: Sequence[Ref[RolloutShard]],
    scores: Sequence[Ref[Scores]],
    epoch: int,
) -> Objects:
    samples = [s for ref in rollouts for s in ROLLOUTS.load(run.store, ref).samples()]
    scored = {row.sample_id: row for ref in scores for row in SCORES.load(run.store, ref).rows()}
    samples.sort(key=lambda sample: sample.sample_id)
    ordered = [scored[sample.sample_id] for sample in samples]
    rows, after = _rows(
        run,
        scorer.config.on_failure == "impute",
        epoch,
        [
            (row.sample_id, sample.prompt, row.reward)
            for row, sample in zip(ordered, samples, strict=True)
        ],
        _parts(run, scorer, ordered),
        open_ref(run.store, before).statistics(),
    )
    return {
        "advantages": encode_advantages(rows, run.config.algorithm.columns),
        "statistics": encode_statistics(after),
    }


def _parts(run: Run, scorer: Scorer, rows: Sequence[RewardRow]) -> list[ScoredPart]:
    """Return the rewards that are normalised each by itself before they are summed, if any."""
    weights = group_weights(scorer.reward)
    try:
        run.config.algorithm.check_reward(normalises_by_group=bool(weights))
    except ValueError as error:
        raise ConfigError(f"reward {scorer.reward_id}: {error}") from None
    return [
        ScoredPart(weight, np.asarray([row.columns.get(label) for row in rows], dtype=np.float64))
        for label, weight in weights.items()
    ]


def _rows(
    run: Run,
    impute: bool,
    epoch: int,
    samples: Sequence[tuple[str, str, float | None]],
    parts: Sequence[ScoredPart],
    statistics: PromptStatistics,
) -> tuple[list[AdvantageRow], PromptStatistics]:
    """Return a row per sample, and the statistics after them, from ids, prompts and rewards."""
    config = run.config
    rewards = summarize(reward for _, _, reward in samples)
    if rewards.constant:
        _logger.warning(
            "epoch %d has nothing to learn from: its %d scored samples all have the reward %g",
            epoch,
            rewards.scored,
            rewards.mean,
        )
    credit = config.algorithm.credit(
        Scored(
            [prompt for _, prompt, _ in samples],
            np.asarray([_or_nan(reward) for _, _, reward in samples], dtype=np.float64),
            samples_per_prompt=config.rollouts.samples_per_prompt,
            impute=impute,
            shuffle_seed=derive_seed(config.seed, "shuffle", epoch),
            parts=parts,
        ),
        statistics,
    )
    rows = [
        AdvantageRow(
            sample_id=sample_id,
            reward=reward,
            status=_status(reward, bool(credit.imputed[i])),
            count=int(credit.count[i]),
            columns={name: float(values[i]) for name, values in credit.columns.items()},
        )
        for i, (sample_id, _, reward) in enumerate(samples)
    ]
    return rows, credit.statistics


def _status(reward: float | None, imputed: bool) -> str:
    if reward is not None:
        return "ok"
    return "imputed" if imputed else "dropped"


def _or_nan(reward: float | None) -> float:
    return float("nan") if reward is None else reward
