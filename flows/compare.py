"""Algorithms compared on equal terms: same first samples, same number of reward queries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from ddpo.analysis.comparison.plan import Comparison, comparison_name, read_comparison
from ddpo.analysis.comparison.report import PLOT, markdown, write_report
from ddpo.analysis.comparison.result import Result, read_result
from ddpo.config import StorageConfig
from ddpo.errors import ConfigError, RunIdentityMismatch
from ddpo.runs.run import Run, check_run, start_run
from ddpo.store import keys
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli.quiet import without_heartbeats
from ddpo_workflow.flows.epoch import artifact_key
from ddpo_workflow.flows.stopping import AbandoningThreads, mark_stopped, note_begun, notice
from ddpo_workflow.flows.train import Text, outputs_folder, train_run
from ddpo_workflow.tasks.advantages import advantages_of
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.progress import as_part, finished_epoch
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.connection import connect, find_or_create_experiment, find_run
from ddpo_workflow.tasks.tracking.epochs import TrackingHandle, track_scores
from ddpo_workflow.tasks.tracking.page import open_comparison_page, open_page
from ddpo_workflow.tasks.tracking.tracker import TrackingError
from ddpo_workflow.tasks.worker import RunHandle, opened


def _comparison_name() -> str:
    asked = flow_run.get_parameters()
    return asked.get("name") or comparison_name(asked["config_file"])


@flow(
    name="ddpo-compare",
    flow_run_name=_comparison_name,
    on_running=[note_begun],
    on_crashed=[mark_stopped],
    on_failure=[mark_stopped],
)
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
    base = comparison.members[0].config
    page = open_comparison_page(
        comparison,
        uri=base.tracking.uri,
        experiment=base.tracking.experiment,
        flow_run_id=flow_run.get_id() or "",
    )
    try:
        store = _run_members(comparison)
        result = read_result(comparison, store)
        folder = comparison_folder(comparison)
        for file in write_report(comparison, result, folder):
            page.log_file(file)
        _show(comparison, result)
    except BaseException as error:
        killed = notice(error)
        with suppress(TrackingError):  # the first error is the one to tell
            page.finish("KILLED" if killed or not isinstance(error, Exception) else "FAILED")
        raise
    page.finish("FINISHED")
    return str(folder)


@flow(  # pyright: ignore[reportCallIssue]  # task runners are typed by what tasks return
    name="ddpo-shared-samples",
    flow_run_name="{handle.run_id}",
    task_runner=AbandoningThreads(max_workers=4),  # pyright: ignore[reportArgumentType]
    on_running=[note_begun],
    on_crashed=[mark_stopped],
    on_failure=[mark_stopped],
)
def draw_shared(handle: RunHandle, tracking: TrackingHandle) -> None:
    """Draw and score all epochs of a run with its first checkpoint, and learn nothing from them.

    Each epoch is committed as any other, with that checkpoint as the one after it.

    Args:
        handle: The run.
        tracking: Its MLflow run.
    """
    run = opened(handle)
    checkpoint = before = start(handle)
    for epoch in range(run.config.epochs):
        rollouts, scoring = [], []
        for shard in range(run.shards):
            rollouts.append(sample_shard(handle, checkpoint, epoch, shard))
            scoring.append(score_shard.submit(handle, rollouts[-1], epoch, shard))
        scores = [scored.result() for scored in scoring]
        before = advantages_of(handle, before, rollouts, scores, epoch)
        commit_epoch(handle, rollouts, scores, before, checkpoint, StorageConfig(), epoch)
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
    opened.cache_clear()  # the operation half may be another than at an earlier start
    handle = RunHandle(root=run.store.root, s3=run.store.s3, run_id=run.run_id)
    page = open_page(run, flow_run_id=flow_run.get_id(), flow_run_name=flow_run.get_name())
    tracking = TrackingHandle(
        uri=run.config.tracking.uri,
        experiment_id=page.experiment_id,
        mlflow_run_id=page.mlflow_run_id,
    )
    try:
        with without_heartbeats():  # the flow around it has its own
            draw_shared(handle, tracking)
    except BaseException as error:
        killed = notice(error)
        with suppress(TrackingError):
            page.finish("KILLED" if killed or not isinstance(error, Exception) else "FAILED")
        raise
    page.finish("FINISHED")


def _is_whole(run: Run) -> bool:
    """Return whether an earlier start has brought a run to its end, its report and page included.

    A whole run would be found done step by step all the same, for the price of loading its model.
    """
    committed = range(run.first_epoch, run.config.epochs)
    if not all(run.store.exists(keys.epoch_manifest_key(run.run_id, e)) for e in committed):
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
