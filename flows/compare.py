"""Algorithms compared on equal terms: same first samples, same number of reward queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from ddpo.analysis.comparison.plan import Comparison, comparison_name, read_comparison
from ddpo.analysis.comparison.report import PLOT, markdown, write_report
from ddpo.analysis.comparison.result import Result, read_result
from ddpo.errors import ConfigError, RunIdentityMismatch
from ddpo.runs.run import Run, check_run, start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH
from ddpo.store.objects import Store
from ddpo_workflow.flows.epoch import submit_shards
from ddpo_workflow.flows.flow import artifact_key, ddpo_flow, without_heartbeats
from ddpo_workflow.flows.train import Text, outputs_folder, train_run
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.progress import as_part, finished_epoch
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.connection import connect, find_or_create_experiment, find_run
from ddpo_workflow.tasks.tracking.metrics import track_scores
from ddpo_workflow.tasks.tracking.page import open_comparison_page, open_page
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle
from ddpo_workflow.tasks.worker import RunHandle, opened


def _comparison_name() -> str:
    asked = flow_run.get_parameters()
    return asked.get("name") or comparison_name(asked["config_file"])


@ddpo_flow(name="ddpo-compare", run_name=_comparison_name)
def compare(
    config_file: str = "configs/starter_compare.yaml",
    name: Text = None,
    storage: Text = None,
    tracking: Text = None,
    overrides: Sequence[str] = (),
) -> str:
    """Train a model by several algorithms, several seeds each, and compare what they achieve.

    Args:
        config_file: A YAML file with `base`, `variants`, `seeds`; `configs/starter_compare.yaml`
            is one.
        name: The comparison's name; that of an existing one goes on with it. Empty: the file's.
        storage: Folder or URL that remembers the runs, as `s3://bucket/prefix`. Empty: the
            config's.
        tracking: MLflow's tracking URI, as `http://host:5000`. Empty: the config's.
        overrides: Any setting of the base, one an item, as `sampler.steps=20`.

    Returns:
        The folder with the comparison's page and plot.
    """
    form = {"storage.root": storage, "tracking.uri": tracking}
    named = [f"{key}={value}" for key, value in form.items() if value is not None]
    comparison = read_comparison(config_file, name, [*overrides, *named])
    check_comparison(comparison)
    with open_comparison_page(comparison) as page:
        store = _run_members(comparison)
        result = read_result(comparison, store)
        folder = comparison_folder(comparison)
        for file in write_report(comparison, result, folder):
            page.log_file(file)
        _show(comparison, result)
    return str(folder)


@ddpo_flow(name="ddpo-shared-samples", run_name="{handle.run_id}")
def sample_shared(handle: RunHandle, tracking: TrackingHandle) -> None:
    """Sample and score all epochs of a run with its first checkpoint, without any training.

    Each epoch is committed like any other, with the first checkpoint as its next one too.

    Args:
        handle: The run.
        tracking: Its page in MLflow.
    """
    run = opened(handle)
    checkpoint = before = start(handle)
    for epoch in range(run.config.epochs):
        sampling, scoring = submit_shards(handle, checkpoint, epoch)
        rollouts = [shard.result() for shard in sampling]
        scores = [shard.result() for shard in scoring]
        before = credit_of(handle, before, rollouts, scores, epoch)
        commit_epoch(handle, rollouts, scores, before, checkpoint, epoch)
        metrics = track_scores(handle, tracking, scores, epoch)
        finished_epoch(epoch + 1, run.config.epochs, metrics)


def check_comparison(comparison: Comparison) -> None:
    """Check that all runs can start or go on, before one of them does.

    Args:
        comparison: The comparison.

    Raises:
        ConfigError: One is there already, of other settings.
        DdpoError: One cannot; or MLflow cannot be reached.
    """
    for member in comparison.members:
        try:
            check_run(member.config, member.run_id)
        except RunIdentityMismatch as error:
            shared = member is comparison.shared[member.seed]
            which = "the run that drew its samples" if shared else "its run"
            lines = "".join(f"\n  {difference}" for difference in error.differences)
            raise ConfigError(
                f"comparison {comparison.name!r} exists, and {which}, {member.run_id!r}, is of "
                f"other settings:{lines}\nWhat has run stays as it is: give the changed comparison "
                "a name of its own (--name), or take the change back"
            ) from error
    connect(comparison.members[0].config.tracking.uri)


def comparison_folder(comparison: Comparison) -> Path:
    """Return the local folder that receives a comparison's page and plot."""
    return outputs_folder(comparison.members[0].config, comparison.name)


def total_epochs(comparison: Comparison) -> int:
    """Return the epochs of all runs together."""
    return sum(member.config.epochs for member in comparison.members)


def _run_members(comparison: Comparison) -> Store:
    """Start or go on with each run in turn; returns the store that has them."""
    total, before = total_epochs(comparison), 0
    store = None
    for member in comparison.members:
        run = start_run(member.config, member.run_id)
        store = run.store
        with as_part(before, total):
            if member is comparison.shared[member.seed]:
                _draw_run(run)
            elif _is_whole(run):
                finished_epoch(run.config.epochs, run.config.epochs, {})
            else:
                train_run(run)
        before += member.config.epochs
    assert store is not None
    return store


def _draw_run(run: Run) -> None:
    """Draw the samples that the variants of a seed share, shown in MLflow as a run."""
    with open_page(run) as page, without_heartbeats():  # the flow around it has its own
        sample_shared(run.handle, page.handle)


def _is_whole(run: Run) -> bool:
    """Return whether an earlier start has brought a run to its end, its report and page included.

    A whole run would be found done step by step all the same, for the price of loading its model.
    """
    committed = range(run.first_epoch, run.config.epochs)
    if not all(EPOCH.exists(run.store, Partition(run.run_id, e)) for e in committed):
        return False
    if not (outputs_folder(run.config, run.run_id) / "report.png").exists():
        return False
    client = connect(run.config.tracking.uri)
    experiment = find_or_create_experiment(client, run.config.tracking.experiment)
    page = find_run(client, experiment, run.run_id)
    return page is not None and page.info.status == "FINISHED"


def _show(comparison: Comparison, result: Result) -> None:
    """Show the page among the flow run's artifacts, without its plot, which is in MLflow."""
    page = markdown(comparison, result)
    create_markdown_artifact(
        key=f"{artifact_key(comparison.name)}-comparison",
        markdown="\n".join(line for line in page.splitlines() if PLOT not in line),
        description=f"{comparison.name}: {', '.join(comparison.config.variants)}",
    )
