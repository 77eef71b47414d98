"""The tasks of an evaluation: sample fixed prompts and seeds, score them, summarize."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.analysis.evaluation.plan import Evaluated, EvaluationSet, noise_seed, same_evaluation_set
from ddpo.analysis.evaluation.summary import evaluation_rows, summarize
from ddpo.basics.digests import canonical_json
from ddpo.basics.images import encode_image
from ddpo.config import EvaluationConfig, LoraConfig, RewardConfig
from ddpo.diffusion.divergence import kl_to_base
from ddpo.diffusion.sampling import sample, sampler_digest
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import Policy
from ddpo.runs import Run
from ddpo.store import keys
from ddpo.store.artefacts import Evaluation, EvaluationScores, EvaluationShard
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import (
    CHECKPOINT,
    EVALUATION,
    EVALUATION_SCORES,
    EVALUATION_SHARD,
    committed,
)
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects
from ddpo.store.tables import RolloutRow, encode_evaluation, encode_rollouts
from ddpo_workflow.tasks.engines import on_device
from ddpo_workflow.tasks.evaluated import labels_of, summary_id
from ddpo_workflow.tasks.progress import report
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.score import scored_rows
from ddpo_workflow.tasks.worker import ON_DEVICE, RunHandle, opened, policy_at, scorer_of


def shards_of(run: Run, images: EvaluationSet) -> list[range]:
    """Return which images each shard of an evaluation has: as many as a shard of an epoch."""
    count, size = len(images.rows), run.config.rollouts.shard_size
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@task(
    name="evaluation samples",
    task_run_name="evaluate checkpoint {epoch} shard {shard}",
    tags=[ON_DEVICE],
    cache_policy=NO_CACHE,
    **STORAGE,
)
def sample_evaluation(
    handle: RunHandle,
    checkpoint: Ref[Checkpoint],
    config: EvaluationConfig,
    weights: Evaluated,
    set_digest: str,
    epoch: int,
    shard: int,
) -> Ref[EvaluationShard]:
    """Sample and commit one shard of the images that a checkpoint is evaluated on, or find it.

    The first shard also measures the KL divergence from the base model.

    Args:
        handle: The run.
        checkpoint: The checkpoint.
        config: The evaluation's settings.
        weights: Which weights to sample with.
        set_digest: Digest of the set of images when the evaluation began.
        epoch: The checkpoint's epoch.
        shard: The shard, from 0.

    Raises:
        ConfigError: The set is another one now.
        RetiredObject: Retention has deleted the checkpoint.
    """
    return on_device(_shard_of, handle, checkpoint, config, weights, set_digest, epoch, shard)


def _shard_of(
    handle: RunHandle,
    checkpoint: Ref[Checkpoint],
    config: EvaluationConfig,
    weights: Evaluated,
    set_digest: str,
    epoch: int,
    shard: int,
) -> Ref[EvaluationShard]:
    run = opened(handle)
    images = same_evaluation_set(run, config, weights, set_digest)
    return committed(
        run.store,
        EVALUATION_SHARD,
        Partition(run.run_id, epoch, shard, images_id=images.set_id),
        {"checkpoint": checkpoint, "set": images.digest, "shard": shard},
        lambda: _sampled(run, checkpoint, images, epoch, shard),
    )


def _sampled(
    run: Run, checkpoint: Ref[Checkpoint], images: EvaluationSet, epoch: int, shard: int
) -> Objects:
    sampler = images.sampler
    indices = shards_of(run, images)[shard]
    rows = [images.rows[index] for index in indices]
    seeds = [noise_seed(prompt.text, seed) for prompt, seed in rows]
    total = len(images.rows)

    with policy_at(run, checkpoint, weights=images.weights) as lease:
        report("evaluation", indices.start, total)
        with lease.policy.sized(images.size):
            sampled = sample(
                lease.policy,
                [prompt.text for prompt, _ in rows],
                seeds,
                sampler,
                updates=lease.state.updates,
            )
            digest_of_sampler = sampler_digest(lease.policy, sampler)
        report("evaluation", indices.stop, total)
        digests = CHECKPOINT.load(run.store, checkpoint).digests
        policy_digest = digests["policy_digest"]
        if images.weights == "average":
            policy_digest = digests.get("ema_digest", policy_digest)
        divergence = _divergence(run, lease.policy, images) if shard == 0 else None
    table = encode_rollouts(
        [
            RolloutRow(
                sample_id=keys.sample_id(run.run_id, epoch, index),
                shard=shard,
                index=index,
                prompt=prompt.text,
                prompt_metadata=prompt.metadata,
                seed=seeds[row],
                policy_digest=policy_digest,
                sampler_digest=digest_of_sampler,
                log_prob_mean=sampled.log_prob_mean(row),
                image_png=encode_image(sampled.images[row]),
            )
            for row, (index, (prompt, _)) in enumerate(zip(indices, rows, strict=True))
        ]
    )
    if divergence is None:
        return {"samples": table}
    return {"samples": table, "divergence": canonical_json({"kl_to_base": divergence})}


def _divergence(run: Run, policy: Policy, images: EvaluationSet) -> list[float | None] | None:
    """Return the KL divergence of each step by the run's own sampler; None if it has none."""
    sampler = run.config.sampler
    lora = isinstance(run.config.trainable, LoraConfig)  # a full fine-tune keeps no base weights
    if not images.kl_samples or not lora or not sampler.stochastic:
        return None
    rows = images.rows[: images.kl_samples]
    kl = kl_to_base(
        policy,
        [prompt.text for prompt, _ in rows],
        [noise_seed(prompt.text, seed) for prompt, seed in rows],
        sampler_of_epoch(policy, run.config, 0),
    )
    return [None if math.isnan(value) else value for value in kl.tolist()]


@task(
    name="evaluation scores",
    task_run_name="score evaluation of checkpoint {epoch} shard {shard}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def score_evaluation(
    handle: RunHandle,
    samples: Ref[EvaluationShard],
    epoch: int,
    shard: int,
    reward: RewardConfig | None = None,
) -> Ref[EvaluationScores]:
    """Score and commit one shard of an evaluation, or find its scores.

    Args:
        handle: The run.
        samples: The shard.
        epoch: The checkpoint's epoch.
        shard: The shard, from 0.
        reward: The reward; by default the run's own.

    Raises:
        RewardError: The reward is broken or unavailable; or it could not score an image, and its
            `on_failure` is 'fail'.
    """
    run = opened(handle)
    scorer = scorer_of(run, reward)
    identity = scorer.reward.identity
    where = EVALUATION_SHARD.partition(samples)
    return committed(
        run.store,
        EVALUATION_SCORES,
        Partition(run.run_id, epoch, shard, identity.reward_id, where.images_id),
        {"samples": samples, "reward_digest": identity.digest},
        lambda: {"rewards": scored_rows(scorer, EVALUATION_SHARD.load(run.store, samples).rows())},
    )


@task(
    name="evaluation",
    task_run_name="summarize evaluation of checkpoint {epoch}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def summarize_evaluation(
    handle: RunHandle,
    config: EvaluationConfig,
    weights: Evaluated,
    set_digest: str,
    samples: Sequence[Ref[EvaluationShard]],
    scores: Sequence[Ref[EvaluationScores]],
    baseline: Ref[Evaluation] | None,
    epoch: int,
) -> Ref[Evaluation]:
    """Summarize and commit a checkpoint's evaluation, or find it.

    Args:
        handle: The run.
        config: The evaluation's settings.
        weights: Which weights were sampled with.
        set_digest: Digest of the set of images when the evaluation began.
        samples: The shards, in order.
        scores: Their scores: those of the run's own reward, then of each other one, shard by shard.
        baseline: The evaluation of the run's first checkpoint; None for that one itself, or if
            retention has deleted it.
        epoch: The checkpoint's epoch.
    """
    run = opened(handle)
    images = same_evaluation_set(run, config, weights, set_digest)
    return committed(
        run.store,
        EVALUATION,
        Partition(run.run_id, epoch, images_id=summary_id(run, config, images)),
        {"samples": list(samples), "scores": list(scores), "baseline": baseline},
        lambda: _summarized(run, config, images, samples, scores, baseline),
    )


def _summarized(
    run: Run,
    config: EvaluationConfig,
    images: EvaluationSet,
    samples: Sequence[Ref[EvaluationShard]],
    scores: Sequence[Ref[EvaluationScores]],
    baseline: Ref[Evaluation] | None,
) -> Objects:
    shards = [EVALUATION_SHARD.load(run.store, ref) for ref in samples]
    drawn = [row for shard in shards for row in shard.rows()]
    labels = labels_of(run, config)
    found: dict[str, dict[str, float | None]] = {label: {} for label in labels}
    for number, ref in enumerate(scores):
        for row in EVALUATION_SCORES.load(run.store, ref).rows():
            found[labels[number // len(shards)]][row.sample_id] = row.reward
    rows = evaluation_rows(drawn, [seed for _, seed in images.rows], found)
    before = EVALUATION.load(run.store, baseline).rows() if baseline else []
    return {
        "images": encode_evaluation(rows),
        "metrics": canonical_json(summarize(rows, drawn, before, shards[0].kl_to_base)),
    }
