"""A run at work on the screen: progress bars, how it was stopped, what came of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table

from ddpo_workflow.flows.cli.common import console, say
from ddpo_workflow.flows.cli.quiet import hide_loading_bars

if TYPE_CHECKING:
    from ddpo.runs.run import Run
    from ddpo.store.objects import Store


def show_run(run_id: str, epochs: int, run: Callable[[], object], store: Store) -> None:
    """Run a flow under progress bars, then show what came of it.

    Args:
        run_id: The run that it starts or goes on with.
        epochs: How many it is to have in the end.
        run: Calls the flow.
        store: Where the run is remembered.
    """
    from ddpo.runs.run import open_run
    from ddpo_workflow.flows.cli.bars import Bars
    from ddpo_workflow.flows.cli.signals import StopHandler, start_server
    from ddpo_workflow.flows.flow import without_heartbeats
    from ddpo_workflow.flows.messages import resume_command
    from ddpo_workflow.tasks.progress import shown_by

    hide_loading_bars()
    again = resume_command(store, run_id)

    def tell() -> None:
        console.show_cursor()  # hidden by bars that may not have come to their end
        say(f"stopped; what is committed is kept. Resume with: {again}")

    bars = Bars(console, run_id, epochs)
    try:
        with StopHandler(tell), without_heartbeats(), bars, shown_by(bars):
            start_server()
            run()
    except Exception as error:
        console.print(f"[bold red]the run failed: {type(error).__name__}[/]", highlight=False)
        say(str(error))
        say(f"What is committed is kept. Resume with: {again}")
        sys.exit(1)
    _summarise(open_run(store, run_id))


def _summarise(run: Run) -> None:
    from ddpo.analysis.report import reward_curve
    from ddpo.basics.redaction import hide_credentials
    from ddpo_workflow.flows.train import outputs_folder
    from ddpo_workflow.tasks.export_weights import ADAPTER_FOLDER, PIPELINE_FOLDER

    curve = reward_curve(run)
    outputs = outputs_folder(run.config, run.run_id)
    table = Table("", "first epoch", "last epoch", title=run.run_id, title_justify="left")
    first, last = curve[0], curve[-1]
    table.add_row("epoch", str(first.epoch), str(last.epoch))
    table.add_row("reward, mean", f"{first.mean:.4f}", f"{last.mean:.4f}")
    table.add_row("reward, std", f"{first.std:.4f}", f"{last.std:.4f}")
    console.print(table)
    places = Table.grid(padding=(0, 2))
    places.add_column()
    places.add_column(overflow="fold")  # a path that is cut short leads nowhere
    places.add_row("report", str(outputs / "report.png"))
    whole = run.config.trainable.type == "full"
    places.add_row("weights", str(outputs / (PIPELINE_FOLDER if whole else ADAPTER_FOLDER)))
    places.add_row("store", run.store.root)
    places.add_row("MLflow", hide_credentials(run.config.tracking.uri))
    places.add_row("look", "ddpo ui")
    console.print(places)
