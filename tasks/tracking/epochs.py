"""The tasks that show a run in MLflow. They read the store; nothing reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from ddpo.basics.images import decode_image
from ddpo.store import manifests
from ddpo.store.checkpoints import load_document
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo.store.tables import decode_advantages, decode_rewards, decode_rollouts
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.tracking.connection import connect
from ddpo_workflow.tasks.tracking.tracker import RunTracker
from ddpo_workflow.tasks.worker import RunHandle, opened


class TrackingHandle(BaseModel, frozen=True):
    """All that a task needs to find its MLflow run."""

    model_config = ConfigDict(extra="forbid")

    uri: str
    """MLflow's tracking URI."""
    experiment_id: str
    """MLflow's id of the experiment."""
    mlflow_run_id: str
    """MLflow's id of the run."""


@lru_cache(maxsize=8)
def tracker(handle: TrackingHandle) -> RunTracker:
    """Open a run's page in MLflow, once a process."""
    return RunTracker(connect(handle.uri), handle.experiment_id, handle.mlflow_run_id)


@task(name="track", task_run_name="track epoch {epoch}", cache_policy=NO_CACHE, **STORAGE)
def track_epoch(
    handle: RunHandle,
    tracking: TrackingHandle,
    scores: Sequence[Ref],
    advantages: Ref,
    following: Ref,
    timings: Mapping[str, float],
    epoch: int,
) -> dict[str, float]:
    """Log an epoch's metrics at step ``epoch``.

    Args:
        handle: The run.
        tracking: Its MLflow run.
        scores: The epoch's scores.
        advantages: The epoch's advantages.
        following: Checkpoint ``epoch + 1``, which holds the update's metrics.
        timings: Seconds and rates by name.
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
    normalised = [row.advantage for row in rows if row.advantage is not None]
    if normalised:
        metrics["reward/advantage_std"] = float(np.std(normalised))
    checkpoint = manifests.load(run.store, following)
    metrics |= _update_metrics(load_document(run.store, checkpoint, "metrics"))
    progress = load_document(run.store, checkpoint, "progress")
    metrics |= {"total/samples": progress["samples"], "total/updates": progress["updates"]}
    tracker(tracking).log_metrics(metrics, step=epoch)
    return metrics


@task(name="track", task_run_name="track scores {epoch}", cache_policy=NO_CACHE, **STORAGE)
def track_scores(
    handle: RunHandle, tracking: TrackingHandle, scores: Sequence[Ref], epoch: int
) -> dict[str, float]:
    """Log an epoch's rewards at step ``epoch``, where nothing was trained.

    Args:
        handle: The run.
        tracking: Its MLflow run.
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
    """Log a checkpoint's pictures at step ``epoch``.

    Args:
        handle: The run.
        tracking: Its MLflow run.
        pictures: The pictures' manifest, if there is one.
        epoch: The checkpoint's epoch.
    """
    if pictures is None:
        return
    run = opened(handle)
    table = run.store.get(manifests.load(run.store, pictures).objects["pictures"])
    for row in decode_rollouts(table):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", row.prompt)[:60]
        key = f"samples/{name}-seed-{row.prompt_metadata['seed']}"
        tracker(tracking).log_picture(key, decode_image(row.image_png), step=epoch)


def reward_metrics(store: Store, scores: Sequence[Ref]) -> dict[str, float]:
    """Return what MLflow shows of an epoch's rewards: mean, std, min, max, and how many failed.

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
