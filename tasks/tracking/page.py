"""A run's page in MLflow, as each start of the run opens it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml

from ddpo.analysis.comparison.plan import Comparison
from ddpo.config import Regression, RewardConfig
from ddpo.runs.run import Run
from ddpo.store import keys
from ddpo_workflow.tasks.tracking.tracker import RunTracker


def open_page(run: Run, *, flow_run_id: str | None, flow_run_name: str | None) -> RunTracker:
    """Open a run's page in MLflow: parameters, tags, the config, the rollouts as a dataset.

    Args:
        run: The run.
        flow_run_id: Prefect's id of the flow run that asks.
        flow_run_name: Its name.

    Returns:
        The page; system metrics run if the config wants them.

    Raises:
        TrackingError: MLflow refuses or is gone.
    """
    tracking = run.config.tracking
    fork = run.config.fork
    lineage = {"ddpo.forked_from": fork.run_id, "ddpo.forked_at": str(fork.epoch)} if fork else {}
    page = RunTracker.open(
        tracking_uri=tracking.uri,
        experiment=tracking.experiment,
        run_id=run.run_id,
        params=_parameters(run),
        tags={
            "ddpo.storage_root": run.store.root,
            "ddpo.git_commit": _git_commit(),
            "prefect.flow_run_id": flow_run_id or "",
            "prefect.flow_run_name": flow_run_name or "",
            **lineage,
        },
        parent=tracking.parent or (fork.run_id if fork else None),
    )
    page.log_rollouts(
        name=f"rollouts-{run.run_id}",
        source_url=run.store.url(keys.rollouts_prefix(run.run_id)),
        digest=run.identity_digest,
        rows=run.config.epochs * run.config.rollouts.samples_per_epoch,
        columns={"sample_id": "string", "prompt": "string", "seed": "int64", "image": "binary"},
    )
    _attach_config(page, run)
    if tracking.system_metrics:
        page.start_system_metrics()
    return page


def open_rescored_page(
    run: Run, reward: RewardConfig, reward_id: str, *, uri: str | None, flow_run_id: str
) -> RunTracker:
    """Open the page of a run's samples under another reward, below the run's own page.

    Args:
        run: The run.
        reward: The new reward.
        reward_id: Its id.
        uri: MLflow's tracking URI; by default the run's.
        flow_run_id: Prefect's id of the flow run that asks.

    Returns:
        The page.

    Raises:
        TrackingError: MLflow refuses or is gone.
    """
    return RunTracker.open(
        tracking_uri=uri or run.config.tracking.uri,
        experiment=run.config.tracking.experiment,
        run_id=f"{run.run_id}-by-{reward_id}",
        params={
            "reward": reward.name,
            "reward_of_run": run.config.reward.name,
            **{f"reward.{name}": json.dumps(value) for name, value in reward.parameters.items()},
        },
        tags={
            "ddpo.storage_root": run.store.root,
            "ddpo.rescored_run": run.run_id,
            "prefect.flow_run_id": flow_run_id,
        },
        parent=run.run_id,
    )


def open_comparison_page(
    comparison: Comparison, *, uri: str, experiment: str, flow_run_id: str
) -> RunTracker:
    """Open a comparison's page, below which those of its runs are shown.

    Args:
        comparison: The comparison.
        uri: MLflow's tracking URI.
        experiment: The experiment of its runs.
        flow_run_id: Prefect's id of the flow run that asks.

    Returns:
        The page.

    Raises:
        TrackingError: MLflow refuses or is gone.
    """
    base = comparison.members[0].config
    return RunTracker.open(
        tracking_uri=uri,
        experiment=experiment,
        run_id=comparison.name,
        params={
            "model": base.model.path,
            "prompts": base.prompts.name,
            "reward": base.reward.name,
            "variants": ", ".join(comparison.config.variants),
            "samples_per_epoch": base.rollouts.samples_per_epoch,
            "offline": comparison.config.offline,
        },
        tags={
            # What may grow when the comparison is repeated; a parameter keeps its first value.
            "ddpo.seeds": ", ".join(map(str, comparison.config.seeds)),
            "ddpo.epochs": str(comparison.epochs),
            "prefect.flow_run_id": flow_run_id,
        },
    )


def _parameters(run: Run) -> dict[str, str | int | float | bool]:
    """Return what tells runs apart at a glance; the whole config is attached as a file.

    MLflow prints every parameter above every picture, so there are few and they are short.
    """
    config = run.config
    by_advantages = not isinstance(config.algorithm, Regression)
    return {
        "model": config.model.path,
        "trainable": config.trainable.type,
        "prompts": config.prompts.name,
        "reward": config.reward.name,
        "algorithm": config.algorithm.type,
        **({"advantages": config.advantages.type} if by_advantages else {}),
        "learning_rate": config.optimizer.learning_rate,
        "samples_per_epoch": config.rollouts.samples_per_epoch,
        "steps": config.sampler.steps,
        "guidance_scale": config.sampler.guidance_scale,
        "seed": config.seed,
    }


def _attach_config(page: RunTracker, run: Run) -> None:
    # Not the operation half: its addresses may hold credentials.
    whole = {**run.config.identity(), "numerics": run.numerics.model_dump(mode="json")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(whole, sort_keys=False))
        page.log_file(file)


def _git_commit() -> str:
    """Return the commit of the code that runs, empty outside a checkout or without git."""
    if shutil.which("git") is None:
        return ""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()
