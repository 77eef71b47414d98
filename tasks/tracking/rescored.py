"""The tasks that log a rescoring to MLflow: how the new reward agrees with the run's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from prefect import task
from prefect.cache_policies import NO_CACHE
from scipy.stats import rankdata

from ddpo.basics.images import decode_image
from ddpo.config import RewardConfig
from ddpo.runs import Run
from ddpo.runs.forks.checks import saved_rollouts
from ddpo.store import keys
from ddpo.store.artefacts import Scores
from ddpo.store.kinds import ROLLOUTS, SCORES
from ddpo.store.manifests import Ref
from ddpo.store.tables import RolloutRow
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.tracking.metrics import legend, reward_metrics
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle, tracker
from ddpo_workflow.tasks.worker import RunHandle, opened, scorer_of

_MOST_DISAGREEMENTS = 8


@task(
    name="track rescored",
    task_run_name="track epoch {epoch} rescored",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def track_rescored(
    handle: RunHandle, tracking: TrackingHandle, scores: Sequence[Ref[Scores]], epoch: int
) -> dict[str, float]:
    """Log an epoch's new rewards, and their correlation with the run's own.

    Args:
        handle: The run.
        tracking: The rescoring's page in MLflow.
        scores: The epoch's new scores.
        epoch: The epoch.

    Returns:
        The metrics by name: reward metrics, and `agreement/pearson` and `agreement/spearman`, the
        correlations with the run's own rewards and between ranks.
    """
    run = opened(handle)
    new = _rewards(run, scores)
    own = _own_rewards(run, epoch)
    pairs = [(own[i], new[i]) for i in sorted(new.keys() & own.keys())]
    metrics = reward_metrics(run.store, scores)
    if len(pairs) > 1:
        first, second = np.asarray(pairs, dtype=np.float64).T
        metrics |= correlations(first, second)
    page = tracker(tracking)

    def log() -> None:
        page.log_metrics(metrics, step=epoch)
        page.describe()

    page.backlog.log(log)
    return metrics


@task(name="track disagreement", cache_policy=NO_CACHE, **STORAGE)
def track_disagreement(
    handle: RunHandle, tracking: TrackingHandle, epochs: Sequence[int], reward: RewardConfig
) -> list[str]:
    """Log images of the samples on which the two rewards disagree most.

    Each reward is standardised over all epochs; disagreement is the difference of the two.

    Args:
        handle: The run.
        tracking: The rescoring's page in MLflow.
        epochs: The rescored epochs.
        reward: The new reward.

    Returns:
        The ids of the logged samples, first those that the new reward ranks higher.
    """
    run = opened(handle)
    reward_id = scorer_of(run, reward).reward_id
    new: dict[str, float] = {}
    own: dict[str, float] = {}
    for epoch in epochs:
        new |= _rewards(run, _scores(run, reward_id, epoch))
        own |= _own_rewards(run, epoch)
    ids = sorted(new.keys() & own.keys())
    if len(ids) < 2:
        return []
    difference = _standardised([new[i] for i in ids]) - _standardised([own[i] for i in ids])
    order = np.argsort(-difference, kind="stable")
    count = min(_MOST_DISAGREEMENTS, len(ids) // 2)
    # Images are logged once per name and step, and must stay what the legend says.
    span = f"epochs-{min(epochs)}-{max(epochs)}"
    names = {
        ids[int(row)]: f"disagreement/{span}-{side}-{rank}"
        for side, rows in (("new-higher", order[:count]), ("own-higher", order[::-1][:count]))
        for rank, row in enumerate(rows)
    }
    page = tracker(tracking)

    def log_images() -> None:
        prompts: dict[str, str] = {}
        for row in _samples(run, names):
            caption = f"new {new[row.sample_id]:.4g}, own {own[row.sample_id]:.4g}"
            page.log_image(names[row.sample_id], _captioned(row, caption), step=max(epochs))
            prompts[names[row.sample_id]] = row.prompt
        page.log_text(legend(prompts), f"prompts/disagreement-{span}.txt")

    page.backlog.log(log_images)
    return list(names)


def correlations(some: NDArray[np.float64], others: NDArray[np.float64]) -> dict[str, float]:
    """Return the Pearson and Spearman correlations of two rewards.

    Args:
        some: Rewards [N].
        others: Rewards of the same samples [N].

    Returns:
        `agreement/pearson` and `agreement/spearman`, in [-1, 1]; empty if either reward is
        constant.
    """
    if not (some.std() and others.std()):
        return {}
    return {
        "agreement/pearson": float(np.corrcoef(some, others)[0, 1]),
        "agreement/spearman": float(np.corrcoef(rankdata(some), rankdata(others))[0, 1]),
    }


def _standardised(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return (array - array.mean()) / (array.std() or 1.0)


def _rewards(run: Run, scores: Sequence[Ref[Scores]]) -> dict[str, float]:
    rows = [row for ref in scores for row in SCORES.load(run.store, ref).rows()]
    return {row.sample_id: row.reward for row in rows if row.reward is not None}


def _own_rewards(run: Run, epoch: int) -> dict[str, float]:
    return _rewards(run, _scores(run, run.reward_id, epoch))


def _scores(run: Run, reward_id: str, epoch: int) -> list[Ref[Scores]]:
    return SCORES.find_all(run.store, run.run_id, epoch, reward_id)


def _samples(run: Run, ids: Collection[str]) -> Iterator[RolloutRow]:
    """Yield samples by id; each shard is read once."""
    shards: dict[tuple[int, int], set[str]] = {}
    for sample in ids:
        parsed = keys.parse_sample_id(sample)
        assert parsed is not None
        _, epoch, index = parsed
        shards.setdefault((epoch, index // run.config.rollouts.shard_size), set()).add(sample)
    for (epoch, shard), wanted in sorted(shards.items()):
        rows = ROLLOUTS.load(run.store, saved_rollouts(run, epoch)[shard]).rows()
        yield from (row for row in rows if row.sample_id in wanted)


def _captioned(row: RolloutRow, caption: str) -> Image.Image:
    """Return a sample's image with its prompt and both rewards below it."""
    image = decode_image(row.image_png)
    width = max(image.width, 256)
    image = image.resize(
        (width, round(image.height * width / image.width)), Image.Resampling.NEAREST
    )
    canvas = Image.new("RGB", (width, image.height + 34), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((4, image.height + 3), row.prompt[:40], fill="black")
    draw.text((4, image.height + 18), caption, fill="black")
    return canvas
