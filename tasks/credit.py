"""The task that turns an epoch's scores into credit: advantages, or a regression's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.algorithms.base import PromptStatistics, Scored
from ddpo.basics.digests import canonical_json
from ddpo.basics.randomness import derive_seed
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import load_document
from ddpo.store.manifests import Committed, Ref
from ddpo.store.tables import AdvantageRow, decode_rewards, encode_advantages
from ddpo_workflow.tasks.prompts import prompts_of
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened


@task(name="advantages", task_run_name="advantages epoch {epoch}", cache_policy=NO_CACHE, **STORAGE)
def credit_of(
    handle: RunHandle,
    checkpoint: Ref,
    rollouts: Sequence[Ref],
    scores: Sequence[Ref],
    epoch: int,
) -> Ref:
    """Commit the credit of an epoch's samples, and the prompt statistics after them.

    Args:
        handle: The run.
        checkpoint: Holds the statistics so far: the checkpoint before the epoch; or, where samples
            are rescored, the credit of the epoch before it.
        rollouts: The epoch's shards, in order.
        scores: Their scores, in order.
        epoch: The epoch.

    Returns:
        The credit's manifest.

    Raises:
        RewardError: No sample has a reward.
    """
    run = opened(handle)
    key, inputs = _identity(run, checkpoint, rollouts, scores, epoch)
    done = manifests.find(run.store, key, inputs=inputs)
    return (done or compute_credit(run, checkpoint, rollouts, scores, epoch)).ref


def _identity(
    run: Run, checkpoint: Ref, rollouts: Sequence[Ref], scores: Sequence[Ref], epoch: int
) -> tuple[str, dict[str, Any]]:
    """Return the manifest key of an epoch's credit, and its inputs."""
    inputs = {
        "checkpoint": checkpoint.model_dump(),
        "rollouts": [ref.model_dump() for ref in rollouts],
        "rewards": [ref.model_dump() for ref in scores],
    }
    reward_id = run.reward.identity.reward_id
    return keys.advantage_manifest_key(reward_id, run.run_id, epoch), inputs


def compute_credit(
    run: Run, checkpoint: Ref, rollouts: Sequence[Ref], scores: Sequence[Ref], epoch: int
) -> Committed:
    """Compute and commit an epoch's credit, whether or not it is committed already.

    Args:
        run: The run.
        checkpoint: Holds the statistics so far: the checkpoint before the epoch; or, where samples
            are rescored, the credit of the epoch before it.
        rollouts: The epoch's shards, in order.
        scores: Their scores, in order.
        epoch: The epoch.

    Returns:
        The commit; an earlier writer's, if there was one.

    Raises:
        RewardError: No sample has a reward.
    """
    reward_id = run.reward.identity.reward_id
    prompt_by_id: dict[str, str] = {}
    reward_by_id: dict[str, float | None] = {}
    for ref in rollouts:
        prompt_by_id |= prompts_of(run, ref)
    for ref in scores:
        table = run.store.get(manifests.load(run.store, ref).objects["rewards"])
        reward_by_id |= {row.sample_id: row.reward for row in decode_rewards(table)}
    ids = sorted(prompt_by_id)
    rows, after = _rows(
        run,
        epoch,
        [(i, prompt_by_id[i], reward_by_id[i]) for i in ids],
        {prompt: tuple(rewards) for prompt, rewards in _statistics_after(run, checkpoint).items()},
    )
    remembered = {prompt: list(rewards) for prompt, rewards in after.items()}
    stem = keys.advantage_stem(reward_id, run.run_id, epoch)
    objects = {
        "advantages": run.store.put(
            stem, ".parquet", encode_advantages(rows, run.config.algorithm.columns)
        ),
        "statistics": run.store.put(
            keys.statistics_stem(reward_id, run.run_id, epoch), ".json", canonical_json(remembered)
        ),
    }
    key, inputs = _identity(run, checkpoint, rollouts, scores, epoch)
    return manifests.commit(run.store, key, kind="advantages", inputs=inputs, objects=objects)


def _statistics_after(run: Run, ref: Ref) -> dict[str, list[float]]:
    """Return the prompt statistics that a checkpoint, or an epoch's credit, ends with."""
    manifest = manifests.load(run.store, ref)
    if manifest.kind == "checkpoint":
        return load_document(run.store, manifest, "progress")["statistics"]
    return load_document(run.store, manifest, "statistics")


def _rows(
    run: Run,
    epoch: int,
    samples: Sequence[tuple[str, str, float | None]],
    statistics: PromptStatistics,
) -> tuple[list[AdvantageRow], PromptStatistics]:
    """Return a row per sample, and the statistics after them, from ids, prompts and rewards."""
    config = run.config
    credit = config.algorithm.credit(
        Scored(
            [prompt for _, prompt, _ in samples],
            np.asarray([_or_nan(reward) for _, _, reward in samples], dtype=np.float64),
            samples_per_prompt=config.rollouts.samples_per_prompt,
            impute=config.reward.on_failure == "impute",
            shuffle_seed=derive_seed(config.seed, "shuffle", epoch),
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
