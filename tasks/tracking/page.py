"""Open a page in MLflow: of a run, of a rescoring, of a comparison."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun
from prefect.runtime import flow_run

from ddpo.analysis.comparison.plan import Comparison
from ddpo.basics.digests import json_digest
from ddpo.config import EvaluationConfig, RewardConfig
from ddpo.config.yaml_text import write_yaml
from ddpo.runs import Run
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH, ROLLOUTS
from ddpo.store.tables import ROLLOUT_SCHEMA
from ddpo_workflow.tasks.tracking.connection import (
    ROOT_TAG,
    RUN_ID_TAG,
    UID_TAG,
    connect,
    find_or_create_experiment,
    find_page,
    waited_for,
)
from ddpo_workflow.tasks.tracking.tracker import RunTracker

RESCORED_TAG = "ddpo.rescored_run"
"""The tag with the name of the run whose samples were rescored."""

EVALUATED_TAG = "ddpo.evaluated_run"
"""The tag with the name of the run whose checkpoints were evaluated."""


def tags_of(run: Run) -> dict[str, str]:
    """Return the tags that only the page of this run has."""
    return {RUN_ID_TAG: run.run_id, UID_TAG: run.uid}


def page_of(run: Run) -> MlflowRun | None:
    """Return a run's page in MLflow; None if it has none.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    tracking = run.config.tracking
    client = connect(tracking.uri)
    return find_page(client, find_or_create_experiment(client, tracking.experiment), tags_of(run))


def open_page(run: Run) -> RunTracker:
    """Open a run's page in MLflow, with its parameters, tags and config.

    Returns:
        The page, with system metrics running if the config asks for them.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    return waited_for(run.config.tracking.uri, lambda: _open_page(run))


def _open_page(run: Run) -> RunTracker:
    tracking = run.config.tracking
    fork = run.fork
    parent = {"ddpo.forked_from": fork.parent_id, "ddpo.forked_at": str(fork.epoch)} if fork else {}
    page = RunTracker.open(
        tracking_uri=tracking.uri,
        experiment=tracking.experiment,
        run_id=run.run_id,
        uid=run.uid,
        # MLflow prints all parameters above the images: a few short ones; a file has the config.
        params=run.labels,
        tags={
            ROOT_TAG: run.store.root,
            "ddpo.git_commit": _git_commit(),
            "prefect.flow_run_id": flow_run.get_id() or "",
            "prefect.flow_run_name": flow_run.get_name() or "",
            **parent,
        },
        parent=_parent_tags(run),
    )
    _attach_config(page, run)
    if tracking.system_metrics:
        page.start_system_metrics()
    return page


def open_rescored_page(
    run: Run, reward: RewardConfig, reward_id: str, *, uri: str | None
) -> RunTracker:
    """Open the page of a run's samples under another reward, nested below the run's own page.

    Args:
        run: The run.
        reward: The new reward.
        reward_id: Its id.
        uri: MLflow's tracking URI; by default the run's.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    return _opened(
        tracking_uri=uri or run.config.tracking.uri,
        experiment=run.config.tracking.experiment,
        run_id=f"{run.run_id}-by-{reward_id}",
        uid=f"{run.uid}-by-{reward_id}",
        params={
            "reward": reward.name,
            "reward_of_run": run.config.reward.name,
            **{f"reward.{name}": json.dumps(value) for name, value in reward.parameters.items()},
        },
        tags={
            ROOT_TAG: run.store.root,
            RESCORED_TAG: run.run_id,
            "prefect.flow_run_id": flow_run.get_id() or "",
        },
        parent=tags_of(run),
    )


def open_evaluation_page(run: Run, name: str, config: EvaluationConfig) -> RunTracker:
    """Open the page of an evaluation that a user asked for, nested below the run's own page.

    Args:
        run: The run.
        name: The evaluation's name in keys.
        config: Its settings.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    return _opened(
        tracking_uri=run.config.tracking.uri,
        experiment=run.config.tracking.experiment,
        run_id=f"{run.run_id}-evaluated-{name}",
        uid=f"{run.uid}-evaluated-{name}",
        params={
            "rewards": ", ".join((run.config.reward.name, *(r.name for r in config.rewards))),
            "prompts": (config.prompts or run.config.prompts).name,
            "count": config.count,
            "seeds": ", ".join(map(str, config.seeds)),
            "steps": config.steps or run.config.sampler.steps,
            "eta": config.eta,
        },
        tags={
            ROOT_TAG: run.store.root,
            EVALUATED_TAG: run.run_id,
            "prefect.flow_run_id": flow_run.get_id() or "",
        },
        parent=tags_of(run),
    )


def open_comparison_page(comparison: Comparison, first: Run) -> RunTracker:
    """Open a comparison's page, below which the pages of its runs are nested.

    Args:
        comparison: The comparison.
        first: Its first run, started: distinguishes the comparison from others of its name.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    base = comparison.members[0].config
    return _opened(
        tracking_uri=base.tracking.uri,
        experiment=base.tracking.experiment,
        run_id=comparison.name,
        uid=f"{first.uid}-comparison",
        params={
            "model": base.model.path,
            "prompts": base.prompts.name,
            "reward": base.reward.name,
            "variants": ", ".join(comparison.config.variants),
            "samples_per_epoch": base.rollouts.samples_per_epoch,
            "offline": comparison.config.offline,
        },
        tags={
            ROOT_TAG: first.store.root,
            # Tags, since a repeated comparison may have more, and parameters cannot change.
            "ddpo.seeds": ", ".join(map(str, comparison.config.seeds)),
            "ddpo.epochs": str(comparison.epochs),
            "prefect.flow_run_id": flow_run.get_id() or "",
        },
    )


def log_samples(page: RunTracker, run: Run) -> None:
    """Log the samples of a run that has finished as a dataset of its page.

    Args:
        page: The run's page.
        run: The run, with all of its epochs committed.
    """
    epochs = range(run.first_epoch, run.config.epochs)
    commits = [EPOCH.commit_of(run.store, Partition(run.run_id, epoch)) for epoch in epochs]
    page.log_rollouts(
        name=f"rollouts-{run.run_id}",
        source_url=run.store.url(ROLLOUTS.data_folder("rollouts", run.run_id)),
        digest=json_digest([commit.ref.sha256 for commit in commits if commit]),
        rows=len(epochs) * run.config.rollouts.samples_per_epoch,
        columns={field.name: str(field.type) for field in ROLLOUT_SCHEMA},
    )


def _opened(*, tracking_uri: str, **page: Any) -> RunTracker:
    """Open a page; wait for MLflow if it is unavailable."""
    return waited_for(tracking_uri, lambda: RunTracker.open(tracking_uri=tracking_uri, **page))


def _parent_tags(run: Run) -> dict[str, str] | None:
    """Return the tags of the page that a run's page is nested under."""
    if run.config.tracking.parent:
        return {RUN_ID_TAG: run.config.tracking.parent, ROOT_TAG: run.store.root}
    return tags_of(run.fork.parent) if run.fork else None


def _attach_config(page: RunTracker, run: Run) -> None:
    # Without the operation half, whose addresses may contain credentials.
    frozen = {**run.config.identity(), "numerics": run.numerics.model_dump(mode="json")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(write_yaml(frozen))
        page.log_file(file)


def _git_commit() -> str:
    """Return the commit of the running code; empty outside a checkout or without git."""
    if shutil.which("git") is None:
        return ""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip()
