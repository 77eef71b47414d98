"""A run's page, with the commands that its reader may want next."""

from __future__ import annotations

from pathlib import Path

from ddpo.analysis.page.render import Command, write_page
from ddpo.runs import Run
from ddpo.store.epochs import committed_epochs
from ddpo_workflow.flows.messages import resume_command, store_command


def write_run_page(run: Run, path: Path) -> Path:
    """Write a run's page as an HTML file.

    Args:
        run: The run.
        path: The file to write; its folder is created if needed.

    Returns:
        ``path``.

    Raises:
        NotInHistory: The run has not committed an epoch.
        StoreError: An object is damaged or missing.
    """
    return write_page(run, path, _commands(run))


def _commands(run: Run) -> list[Command]:
    epochs = committed_epochs(run.store, run.run_id)
    if not epochs:
        return []
    fork = store_command(run.store, "fork", run.run_id, "--epoch", str(epochs[-1]))
    return [
        Command("Resume the run where it stopped:", resume_command(run.store, run.run_id)),
        Command("Start a new run from its last epoch; --reward changes the reward:", fork),
    ]
