"""The task that logs an evaluation to MLflow."""

from __future__ import annotations

import logging
import re

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.analysis.evaluation.plan import Evaluated
from ddpo.config import EvaluationConfig
from ddpo.store.artefacts import Evaluation
from ddpo.store.kinds import EVALUATION
from ddpo.store.manifests import Ref
from ddpo_workflow.tasks.evaluated import alarms_of
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle, tracker
from ddpo_workflow.tasks.worker import RunHandle, opened

_logger = logging.getLogger(__name__)
PREFIXES: dict[Evaluated, str] = {"trained": "evaluation", "average": "evaluation_average"}
"""What the metrics of each set of weights are named under."""
ALARMS = "alarms"
"""The metric that every evaluation has, whatever it measures: the number of its alarms."""


@task(
    name="track evaluation",
    task_run_name="track evaluation of checkpoint {epoch}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def track_evaluation(
    handle: RunHandle,
    tracking: TrackingHandle,
    config: EvaluationConfig,
    evaluation: Ref[Evaluation],
    weights: Evaluated,
    epoch: int,
) -> dict[str, float]:
    """Log the summary of a checkpoint's evaluation at step ``epoch``, and warn of what looks wrong.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
        config: The evaluation's settings.
        evaluation: The evaluation.
        weights: The weights that were evaluated; they name the metrics.
        epoch: The checkpoint's epoch.

    Returns:
        The summary by name, without the prefix.
    """
    run = opened(handle)
    found = EVALUATION.load(run.store, evaluation)
    wrong = alarms_of(run, config, epoch, weights)
    if wrong:
        _logger.warning("checkpoint %d may exploit its reward: %s", epoch, "; ".join(wrong))
    prefix = PREFIXES[weights]
    metrics = {
        f"{prefix}/{re.sub(r'[^A-Za-z0-9_./ -]+', '_', name)}": value
        for name, value in {**found.metrics, ALARMS: float(len(wrong))}.items()
    }
    page = tracker(tracking)
    page.backlog.log(lambda: page.log_metrics(metrics, step=epoch))
    return found.metrics
