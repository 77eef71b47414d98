"""Open a page in MLflow: of a run, of a rescoring, of a comparison."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from ddpo.analysis.comparison.plan import Comparison
from ddpo.config import EvaluationConfig, RewardConfig
from ddpo.config.yaml_text import write_yaml
from ddpo.runs import Run
from ddpo_workflow.tasks.tracking.connection import (
    ROOT_TAG,
    RUN_ID_TAG,
    UID_TAG,
    connect,
    find_page,
    waited_for,
)
from ddpo_workflow.tasks.tracking.description import (
    COMMAND_TAG,
    EPOCHS_TAG,
    EVALUATED_TAG,
    FLOW_RUN_TAG,
    FLOW_RUN_URL_TAG,
    RESCORED_TAG,
)
from ddpo_workflow.tasks.tracking.experiment import find_or_create_experiment
from ddpo_workflow.tasks.tracking.origin import git
from ddpo_workflow.tasks.tracking.samples import log_prompts
from ddpo_workflow.tasks.tracking.tracker import RunTracker


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


def open_page(run: Run, command: str = "") -> RunTracker:
    """Open a run's page in MLflow, with its parameters, tags and config.

    Args:
        run: The run.
        command: The command that resumes it.

    Returns:
        The page, with system metrics running if the config asks for them.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    return waited_for(run.config.tracking.uri, lambda: _open_page(run, command))


def _open_page(run: Run, command: str) -> RunTracker:
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
            EPOCHS_TAG: str(run.config.epochs),
            COMMAND_TAG: command,
            "ddpo.git_commit": _commit_of_code(),
            **_flow_run_tags(),
            **parent,
        },
        parent=_parent_tags(run),
    )
    _attach_config(page, run)
    log_prompts(page, run)
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
            **_flow_run_tags(),
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
            **_flow_run_tags(),
        },
        parent=tags_of(run),
    )


def open_comparison_page(comparison: Comparison, first: Run, command: str = "") -> RunTracker:
    """Open a comparison's page, below which the pages of its runs are nested.

    Args:
        comparison: The comparison.
        first: Its first run, started: distinguishes the comparison from others of its name.
        command: The command that resumes it.

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
            "ddpo.epochs_per_variant": str(comparison.epochs),
            COMMAND_TAG: command,
            **_flow_run_tags(),
        },
    )


def _opened(*, tracking_uri: str, **page: Any) -> RunTracker:
    """Open a page; wait for MLflow if it is unavailable."""
    return waited_for(tracking_uri, lambda: RunTracker.open(tracking_uri=tracking_uri, **page))


def _flow_run_tags() -> dict[str, str]:
    """Return the tags of the flow run that writes a page; a temporary server has no address."""
    flow_run_id = flow_run.get_id()
    return {
        FLOW_RUN_TAG: flow_run_id or "",
        FLOW_RUN_URL_TAG: (flow_run_id and url_for("flow-run", flow_run_id)) or "",
        "prefect.flow_run_name": flow_run.get_name() or "",
    }


def _commit_of_code() -> str:
    """Return the commit of the running code; empty where it is not a checkout."""
    file = Path(__file__)
    tracked = git("ls-files", file.name, folder=file.parent)
    return git("rev-parse", "HEAD", folder=file.parent) if tracked else ""


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
