"""Compare algorithms on equal terms: the same first samples, the same number of reward queries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from ddpo.analysis.comparison.page import write_page
from ddpo.analysis.comparison.plan import Comparison, comparison_name
from ddpo.analysis.comparison.report import PLOT, markdown, write_report
from ddpo.analysis.comparison.result import Result, read_result
from ddpo.runs import Run
from ddpo.runs.lease import held_lease
from ddpo.runs.outputs import outputs_folder, own_outputs_folder
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH
from ddpo_workflow.flows.endings import recording_end
from ddpo_workflow.flows.epoch import submit_shards
from ddpo_workflow.flows.flow import artifact_key, ddpo_flow, without_heartbeats
from ddpo_workflow.flows.forms import Text
from ddpo_workflow.flows.links import link_page
from ddpo_workflow.flows.messages import store_command
from ddpo_workflow.flows.prefect_server import show, watched_server
from ddpo_workflow.flows.run_requests import CompareRequest, ComparisonPlan
from ddpo_workflow.flows.train import note_batch_sizes, train_run
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.engines import held_gpus
from ddpo_workflow.tasks.evaluated import is_evaluated
from ddpo_workflow.tasks.progress import as_part, finished_epoch, logged, note
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.connection import waited_for
from ddpo_workflow.tasks.tracking.metrics import track_scores
from ddpo_workflow.tasks.tracking.page import open_comparison_page, open_page, page_of
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle
from ddpo_workflow.tasks.worker import RunHandle, opened


def _comparison_name() -> str:
    parameters = flow_run.get_parameters()
    return parameters.get("name") or comparison_name(parameters["config_file"])


@ddpo_flow(name="ddpo-compare", run_name=_comparison_name)
def compare(
    config_file: str = "configs/starter_compare.yaml",
    name: Text = None,
    storage: Text = None,
    tracking: Text = None,
    overrides: Sequence[str] = (),
) -> str:
    """Train a model by several algorithms, with several seeds each, and compare the results.

    Args:
        config_file: A YAML file with `base`, `variants` and `seeds`, such as
            `configs/starter_compare.yaml`.
        name: The comparison's name. An existing comparison is resumed. Empty: the file's name.
        storage: Folder or URL of the store, such as `s3://bucket/prefix`. Empty: the config's.
        tracking: MLflow's tracking URI, such as `http://host:5000`. Empty: the config's.
        overrides: Any setting of the base, one per item, such as `sampler.steps=20`.

    Returns:
        The folder with the comparison's page and plot.
    """
    plan = CompareRequest(
        config_file=config_file,
        name=name,
        storage=storage,
        tracking=tracking,
        overrides=tuple(overrides),
    ).plan()
    comparison = plan.comparison
    first = plan.runs[comparison.members[0].run_id].start()
    key = artifact_key(comparison.name, first.uid)
    config_path = str(Path(config_file).absolute())
    words = ["compare", config_path, "--name", comparison.name]
    words += [word for override in overrides for word in ("--set", override)]
    command = store_command(plan.store, *words)
    with open_comparison_page(comparison, first, command) as page:
        link_page(page, key, comparison.name)
        with held_gpus(first.config.engine, first.numerics.device, comparison.name):
            _run_members(plan, first, command)
        result = read_result(comparison, plan.store)
        folder = own_outputs_folder(first.config, comparison.name, first.uid)
        files = write_report(comparison, result, folder)
        files.append(write_page(comparison, result, plan.store, folder / "comparison.html"))
        for file in files:
            page.backlog.log(partial(page.log_file, file))
        _show(comparison, result, key)
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


def _run_members(plan: ComparisonPlan, first: Run, command: str) -> None:
    """Start or resume each run in turn; the first one is started."""
    comparison, before = plan.comparison, 0
    for number, member in enumerate(comparison.members, start=1):
        note(f"run {number} of {len(comparison.members)}: {member.run_id}")
        with as_part(before, plan.epochs), held_lease(plan.store, member.run_id):
            run = first if member.run_id == first.run_id else plan.runs[member.run_id].start()
            note_batch_sizes(plan.runs[member.run_id], run)
            if member is comparison.shared[member.seed]:
                # The flow around it has heartbeats.
                with (
                    recording_end(run),
                    watched_server(),
                    open_page(run, command) as page,
                    without_heartbeats(),
                    logged(),
                ):
                    sample_shared(run.handle, page.handle)
            elif _is_whole(run):
                finished_epoch(run.config.epochs, run.config.epochs, {})
            else:
                train_run(run)
        before += member.config.epochs


def _is_whole(run: Run) -> bool:
    """Return whether an earlier start has finished a run, including its report and page.

    Training it again would change nothing, but would load its model for nothing.
    """
    committed = range(run.first_epoch, run.config.epochs)
    if not all(EPOCH.exists(run.store, Partition(run.run_id, e)) for e in committed):
        return False
    if not (outputs_folder(run.config, run.run_id, run.uid) / "report.png").exists():
        return False
    config = run.config.evaluation
    if config and not is_evaluated(run, config, run.config.epochs):
        return False
    page = waited_for(run.config.tracking.uri, lambda: page_of(run))
    return page is not None and page.info.status == "FINISHED"


def _show(comparison: Comparison, result: Result, key: str) -> None:
    """Add the report to the flow run's artifacts, without its plot, which is in MLflow."""
    page = markdown(comparison, result)
    text = "\n".join(line for line in page.splitlines() if PLOT not in line)
    description = f"{comparison.name}: {', '.join(comparison.config.variants)}"
    show(lambda: create_markdown_artifact(text, key=f"{key}-comparison", description=description))
