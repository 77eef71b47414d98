"""The tasks that log a run's metrics and images to MLflow, from what is in the store."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.basics.images import decode_image
from ddpo.store import manifests
from ddpo.store.checkpoints import load_document
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo.store.tables import decode_advantages, decode_rewards, decode_rollouts
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle, tracker
from ddpo_workflow.tasks.worker import RunHandle, opened


@task(name="track", task_run_name="track epoch {epoch}", cache_policy=NO_CACHE, **STORAGE)
def track_epoch(
    handle: RunHandle,
    tracking: TrackingHandle,
    scores: Sequence[Ref],
    advantages: Ref,
    next_checkpoint: Ref,
    timings: Mapping[str, float],
    epoch: int,
) -> dict[str, float]:
    """Log an epoch's metrics at step ``epoch``.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
        scores: The epoch's scores.
        advantages: The epoch's advantages.
        next_checkpoint: Checkpoint ``epoch + 1``, which holds the update's metrics.
        timings: Seconds and rates by name; logged as ``time/<name>``.
        epoch: The epoch.

    Returns:
        The metrics by name.
    """
    run = opened(handle)
    metrics = {f"time/{name}": value for name, value in timings.items()}
    metrics |= reward_metrics(run.store, scores)
    table = run.store.get(manifests.load(run.store, advantages).objects["advantages"])
    rows = decode_advantages(table)
    metrics["reward/imputed"] = float(sum(row.status == "imputed" for row in rows))
    normalised = [row.columns["advantage"] for row in rows if "advantage" in row.columns]
    if normalised:
        metrics["reward/advantage_std"] = float(np.std(normalised))
    checkpoint = manifests.load(run.store, next_checkpoint)
    metrics |= _update_metrics(load_document(run.store, checkpoint, "metrics"))
    progress = load_document(run.store, checkpoint, "progress")
    metrics |= {"total/samples": progress["samples"], "total/updates": progress["updates"]}
    tracker(tracking).log_metrics(metrics, step=epoch)
    return metrics


@task(name="track", task_run_name="track scores {epoch}", cache_policy=NO_CACHE, **STORAGE)
def track_scores(
    handle: RunHandle, tracking: TrackingHandle, scores: Sequence[Ref], epoch: int
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
    metrics = reward_metrics(opened(handle).store, scores)
    tracker(tracking).log_metrics(metrics, step=epoch)
    return metrics


@task(
    name="track pictures",
    task_run_name="track pictures of checkpoint {epoch}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def track_pictures(
    handle: RunHandle, tracking: TrackingHandle, pictures: Ref | None, epoch: int
) -> None:
    """Log the images of a checkpoint at step ``epoch``.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
        pictures: The images' manifest, if there is one.
        epoch: The checkpoint's epoch.
    """
    if pictures is None:
        return
    run = opened(handle)
    table = run.store.get(manifests.load(run.store, pictures).objects["pictures"])
    for row in decode_rollouts(table):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", row.prompt)[:60]
        key = f"samples/{name}-seed-{row.prompt_metadata['seed']}"
        tracker(tracking).log_image(key, decode_image(row.image_png), step=epoch)


def reward_metrics(store: Store, scores: Sequence[Ref]) -> dict[str, float]:
    """Return an epoch's reward metrics: mean, std, min, max, and the number of failures.

    Args:
        store: The store.
        scores: The epoch's scores.

    Returns:
        Metrics by name.
    """
    rows = [
        row
        for ref in scores
        for row in decode_rewards(store.get(manifests.load(store, ref).objects["rewards"]))
    ]
    scored = np.asarray([row.reward for row in rows if row.reward is not None], dtype=np.float64)
    metrics = {"reward/failed": float(len(rows) - len(scored))}
    if len(scored):
        metrics |= {
            "reward/mean": float(scored.mean()),
            "reward/std": float(scored.std()),
            "reward/min": float(scored.min()),
            "reward/max": float(scored.max()),
        }
    return metrics


def _update_metrics(document: Mapping[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, value in document.items():
        if name == "initial_ratio_deviation":
            metrics |= {f"update/{name}_{part}": float(v) for part, v in value.items()}
        elif isinstance(value, int | float):
            metrics[f"update/{name}"] = float(value)
    return metrics
