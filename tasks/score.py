"""The task that scores one shard. It needs no diffusion model, so it may run anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.basics.images import decode_image
from ddpo.config import RewardConfig
from ddpo.errors import RewardError
from ddpo.prompts import Prompt
from ddpo.rewards.scoring import score_samples
from ddpo.runs import Run, Scorer
from ddpo.store.artefacts import RolloutShard, Scores
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS, SCORES, committed
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects
from ddpo.store.tables import RewardRow, RolloutRow, encode_rewards
from ddpo_workflow.tasks.inherit import inherited_scores
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened, scorer_of


@task(
    name="score",
    task_run_name="score epoch {epoch} shard {shard}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def score_shard(
    handle: RunHandle,
    rollouts: Ref[RolloutShard],
    epoch: int,
    shard: int,
    reward: RewardConfig | None = None,
) -> Ref[Scores]:
    """Score and commit one shard, or find its scores.

    A fork's inherited shard inherits the parent's scores by the same reward.

    Args:
        handle: The run.
        rollouts: The shard's samples.
        epoch: The epoch.
        shard: The shard.
        reward: The reward; by default the run's own.

    Raises:
        RewardError: The reward is broken or unavailable; or it could not score a sample, and
            `reward.on_failure` is 'fail'.
    """
    run = opened(handle)
    return scores_of(run, scorer_of(run, reward), rollouts, epoch, shard)


def scores_of(
    run: Run, scorer: Scorer, rollouts: Ref[RolloutShard], epoch: int, shard: int
) -> Ref[Scores]:
    """Return a shard's scores; score and commit it if there are none. See `score_shard`."""
    identity = scorer.reward.identity
    return committed(
        run.store,
        SCORES,
        Partition(run.run_id, epoch, shard, identity.reward_id),
        {"rollouts": rollouts, "reward_digest": identity.digest},
        lambda: (
            inherited_scores(run, scorer, rollouts, epoch, shard) or _scored(run, scorer, rollouts)
        ),
    )


def _scored(run: Run, scorer: Scorer, rollouts: Ref[RolloutShard]) -> Objects:
    return {"rewards": scored_rows(scorer, ROLLOUTS.load(run.store, rollouts).rows())}


def scored_rows(scorer: Scorer, samples: Sequence[RolloutRow]) -> bytes:
    """Return the table of the scores of some samples.

    Args:
        scorer: The reward.
        samples: The samples with their images.

    Raises:
        RewardError: As `score_shard`.
    """
    images = [decode_image(sample.image_png) for sample in samples]
    prompts = [Prompt(sample.prompt, sample.prompt_metadata) for sample in samples]
    config = scorer.config
    outcomes = score_samples(scorer.reward, images, prompts, tries=config.tries)
    rows = [
        RewardRow(sample.sample_id, outcome.value, outcome.status, outcome.columns)
        for sample, outcome in zip(samples, outcomes, strict=True)
    ]
    failed = [row for row in rows if row.reward is None]
    if failed and config.on_failure == "fail":
        raise RewardError(
            f"{len(failed)} of {len(rows)} samples could not be scored in {config.tries} tries, "
            f"the first {failed[0].sample_id}: {failed[0].status}. Set reward.on_failure to drop "
            "or impute to continue without them"
        )
    return encode_rewards(rows)
