"""The tasks that log a run's metrics and images to MLflow, from what is in the store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.analysis.rewards import summarize
from ddpo.basics.digests import sha256_bytes
from ddpo.basics.images import decode_image
from ddpo.runs import Run
from ddpo.store.artefacts import AdvantageTable, CheckpointImages, Scores
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, IMAGES, SCORES
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.tracking.samples import log_samples
from ddpo_workflow.tasks.tracking.tracker import RunTracker, TrackingHandle, tracker
from ddpo_workflow.tasks.worker import RunHandle, opened

_NAME_LENGTH = 60
_DIGEST_LENGTH = 8


@task(name="track", task_run_name="track epoch {epoch}", cache_policy=NO_CACHE, **STORAGE)
def track_epoch(
    handle: RunHandle,
    tracking: TrackingHandle,
    advantages: Ref[AdvantageTable],
    next_checkpoint: Ref[Checkpoint],
    timings: Mapping[str, float],
    epoch: int,
) -> dict[str, float]:
    """Log an epoch's metrics at step ``epoch``.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
        advantages: The epoch's advantages.
        next_checkpoint: Checkpoint ``epoch + 1``, which holds the update's metrics.
        timings: Seconds and rates by name; logged as ``time/<name>``.
        epoch: The epoch.

    Returns:
        The metrics by name.
    """
    run = opened(handle)
    # They have the rewards too, and are kept where retention deletes the scores.
    rows = ADVANTAGES.load(run.store, advantages).rows()
    metrics = _reward_metrics(row.reward for row in rows)
    metrics["scores/imputed"] = float(sum(row.status == "imputed" for row in rows))
    normalised = [row.columns["advantage"] for row in rows if "advantage" in row.columns]
    if normalised:
        metrics["update/advantage_std"] = float(np.std(normalised))
    checkpoint = CHECKPOINT.load(run.store, next_checkpoint)
    metrics |= _update_metrics(checkpoint.metrics)
    metrics |= {"total/samples": checkpoint.samples, "total/updates": checkpoint.updates}
    metrics |= {f"time/{name}": value for name, value in timings.items()}
    page = tracker(tracking)
    page.backlog.log(lambda: _log_epoch(run, page, metrics, epoch))
    return metrics


@task(name="track", task_run_name="track scores {epoch}", cache_policy=NO_CACHE, **STORAGE)
def track_scores(
    handle: RunHandle, tracking: TrackingHandle, scores: Sequence[Ref[Scores]], epoch: int
) -> dict[str, float]:
    """Log the rewards of an epoch without training at step ``epoch``.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
        scores: The epoch's scores.
        epoch: The epoch.

    Returns:
        The metrics by name.
    """
    run = opened(handle)
    metrics = reward_metrics(run.store, scores)
    page = tracker(tracking)
    page.backlog.log(lambda: _log_epoch(run, page, metrics, epoch))
    return metrics


@task(
    name="track pictures",
    task_run_name="track pictures of checkpoint {epoch}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def track_pictures(
    handle: RunHandle, tracking: TrackingHandle, pictures: Ref[CheckpointImages] | None, epoch: int
) -> None:
    """Log the images of a checkpoint at step ``epoch``.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
        pictures: The images' manifest, if there is one.
        epoch: The checkpoint's epoch.
    """
    if pictures is not None:
        run, page = opened(handle), tracker(tracking)
        page.backlog.log(lambda: _log_pictures(run, page, pictures, epoch))


def _log_epoch(run: Run, page: RunTracker, metrics: Mapping[str, float], epoch: int) -> None:
    log_samples(page, run, epoch)
    page.log_metrics(metrics, step=epoch)  # last: an epoch that has them is not caught up with
    page.describe()


def _log_pictures(run: Run, page: RunTracker, pictures: Ref[CheckpointImages], epoch: int) -> None:
    prompts: dict[str, str] = {}
    for row in IMAGES.load(run.store, pictures).rows():
        key = image_key(row.prompt, row.prompt_metadata["seed"])
        prompts[key] = row.prompt
        page.log_image(key, decode_image(row.image_png), step=epoch)
    images_id = IMAGES.partition(pictures).images_id
    page.log_text(legend(prompts), f"prompts/{images_id}.txt")


def image_key(prompt: str, seed: object) -> str:
    """Return the name of a prompt's images in MLflow's grid: another one for every prompt.

    MLflow allows few characters. A name that does not show the whole prompt ends with a digest of
    it; `legend` has the prompt.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", prompt)
    if len(name) > _NAME_LENGTH or name.replace("_", " ") != prompt:
        digest = sha256_bytes(prompt.encode())[:_DIGEST_LENGTH]
        name = f"{name[:_NAME_LENGTH].strip('_')}-{digest}".lstrip("-")
    return f"samples/{name}-seed-{seed}"


def legend(prompts: Mapping[str, str]) -> str:
    """Return a text with the prompt of each image of MLflow's grid, one image a line.

    Args:
        prompts: Prompts by the names of their images.
    """
    return "".join(
        f"{key}: {json.dumps(prompt, ensure_ascii=False)}\n" for key, prompt in prompts.items()
    )


def reward_metrics(store: Store, scores: Sequence[Ref[Scores]]) -> dict[str, float]:
    """Return an epoch's reward metrics: mean, std, min, max, and the number of failures.

    ``scores/constant`` is 1 where all samples have the same reward.

    Args:
        store: The store.
        scores: The epoch's scores.

    Returns:
        Metrics by name.
    """
    return _reward_metrics(row.reward for ref in scores for row in SCORES.load(store, ref).rows())


def _reward_metrics(values: Iterable[float | None]) -> dict[str, float]:
    rewards = summarize(values)
    counts = {"scores/failed": float(rewards.failed)}
    if not rewards.scored:
        return counts
    return {
        "reward/mean": rewards.mean,
        "reward/std": rewards.std,
        "scores/min": rewards.min,
        "scores/max": rewards.max,
        "scores/constant": float(rewards.constant),
        **counts,
    }


def _update_metrics(document: Mapping[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, value in document.items():
        if name == "initial_ratio_deviation":
            metrics |= {f"update/{name}_{part}": float(v) for part, v in value.items()}
        elif isinstance(value, int | float):
            metrics[f"update/{name}"] = float(value)
    return metrics
