"""A flow run from the command line: progress bars, how a stop is reported, the summary."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rich.table import Table

from ddpo.errors import GpuInUse, RunBeingTrained
from ddpo_workflow.flows.cli import early_stop
from ddpo_workflow.flows.cli.quiet import hide_loading_bars
from ddpo_workflow.flows.cli.screen import console, say, show, show_places
from ddpo_workflow.flows.cli.temporary_server import begin_server, start_server
from ddpo_workflow.flows.messages import as_called, resume_command, ui_command

if TYPE_CHECKING:
    from ddpo.config import EvaluationConfig
    from ddpo.runs import Run, RunPlan
    from ddpo_workflow.flows.run_requests import Request

Plan = TypeVar("Plan")

NOTHING_BEGUN = "No run has begun: there is nothing to resume. Run the command again to start"


@contextmanager
def checked(request: Request[Plan]) -> Iterator[Plan]:
    """Resolve and check a request, for the flow that is called within.

    Args:
        request: The request.

    Yields:
        What the request resolves to.
    """
    say("checking model, store and tracking ...", style="dim")
    gc.disable()  # a tenth of the time of imports; `running` turns it on
    try:
        with early_stop.nothing_begun(), request.resolved(beside_imports=begin_server) as plan:
            yield plan
    finally:
        gc.enable()


def show_run(plan: RunPlan, train: Callable[[], object]) -> None:
    """Train a run under progress bars, then print a summary.

    Args:
        plan: The run.
        train: Calls the flow that trains it.
    """
    from ddpo.runs import open_run
    from ddpo_workflow.flows.cli.bars import bars_in_terminal

    command = resume_command(plan.store, plan.run_id)

    def advice() -> str:
        if plan.begun.is_set():
            return f"Committed work is kept. Resume with: {command}"
        return NOTHING_BEGUN

    say(f"run {plan.run_id}")
    bars = bars_in_terminal(console, plan.run_id, plan.config.epochs)
    with running("the run", advice), bars:
        train()
    _summarise(open_run(plan.store, plan.run_id))


@contextmanager
def running(what: str, advice: Callable[[], str]) -> Iterator[None]:
    """Run a flow within: a stop or a failure ends the command with advice on how to continue.

    Args:
        what: What runs, for the message of a failure.
        advice: Says how to continue.
    """
    begin_server()
    from ddpo_workflow.flows.cli.signals import StopHandler
    from ddpo_workflow.flows.flow import without_heartbeats

    def show_stopped() -> None:
        console.show_cursor()  # in case bars that were abandoned have hidden it
        say(f"stopped. {advice()}")

    hide_loading_bars()
    early_stop.leave()
    try:
        with StopHandler(show_stopped), without_heartbeats():
            start_server()
            # What is imported stays: collections need not look at it, nor a fork copy it.
            gc.freeze()
            gc.enable()
            yield
    except (GpuInUse, RunBeingTrained):
        raise  # this command has begun nothing that could be resumed
    except Exception as error:
        say(f"{what} failed: {type(error).__name__}", style="bold red")
        say(as_called(str(error)))
        say(advice())
        sys.exit(1)


def _summarise(run: Run) -> None:
    from ddpo.analysis.rewards import remarks, reward_curve
    from ddpo.basics.redaction import hide_credentials
    from ddpo.config import TrackingConfig
    from ddpo.runs.outputs import outputs_folder
    from ddpo_workflow.tasks.export_weights import ADAPTER_FOLDER, PIPELINE_FOLDER

    curve = reward_curve(run)
    say(run.run_id, style="bold")
    table = Table("", "first epoch", "last epoch")
    first, last = curve[0], curve[-1]
    table.add_row("epoch", str(first.epoch), str(last.epoch))
    table.add_row("reward, mean", f"{first.mean:.4f}", f"{last.mean:.4f}")
    table.add_row("reward, std", f"{first.std:.4f}", f"{last.std:.4f}")
    show(table)
    for line in remarks(curve):
        say(line)
    if run.config.evaluation:
        _show_evaluation(run, run.config.evaluation)
    outputs = outputs_folder(run.config, run.run_id, run.uid)
    full = run.config.trainable.type == "full"
    show_places(
        {
            "report": str(outputs / "report.png"),
            "page": str(outputs / "report.html"),
            "weights": str(outputs / (PIPELINE_FOLDER if full else ADAPTER_FOLDER)),
            "store": run.store.root,
            "MLflow": hide_credentials(run.config.tracking.uri),
            "look": ui_command(run.config.tracking.uri, TrackingConfig().uri),
        }
    )


def _show_evaluation(run: Run, config: EvaluationConfig) -> None:
    """Print what the last checkpoint's evaluation says of each reward."""
    from ddpo.analysis.evaluation.champion import champion_text, gate_reason
    from ddpo.analysis.evaluation.summary import labels_in, score_text
    from ddpo_workflow.tasks.evaluated import alarms_of, evaluated_epochs, metrics_of

    last = evaluated_epochs(run, config, "trained")[-1]
    metrics = metrics_of(run, config, last)
    say("evaluated on fixed prompts and seeds, against the first checkpoint:")
    for label in labels_in(metrics):
        say(f"  {label}  {score_text(metrics, label)}")
    if wrong := alarms_of(run, config, last):
        say("the weights may exploit the reward; look at the images:", style="bold yellow")
        for alarm in wrong:
            say(f"  {alarm}")
    if reason := gate_reason(run):
        say(reason, style="bold yellow")
    say(champion_text(run))
