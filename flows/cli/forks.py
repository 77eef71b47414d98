"""`ddpo rescore`, `fork` and `compare`: what is saved, used by other rewards and algorithms."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ddpo_workflow.flows.cli.common import (
    ConfigFile,
    Epochs,
    Parameters,
    Root,
    RunId,
    Settings,
    console,
    overrides,
    read_parameters,
    saved_run,
    say,
)
from ddpo_workflow.flows.cli.quiet import hide_loading_bars
from ddpo_workflow.flows.cli.running import show_run

if TYPE_CHECKING:
    from ddpo.analysis.comparison.plan import Comparison
    from ddpo.analysis.comparison.report import Table as Cells
    from ddpo.store.objects import Store

app = typer.Typer()


@app.command()
def rescore(
    run_id: RunId,
    reward: Annotated[str, typer.Option(help="A name that `ddpo rewards` lists, or module:name.")],
    param: Parameters = None,
    epochs: Epochs = None,
    root: Root = None,
) -> None:
    """Score a run's saved samples with another reward; nothing is drawn again."""
    from ddpo.rewards import load_reward
    from ddpo.runs.run import storage_root
    from ddpo_workflow.flows.cli.signals import StopHandler, start_server
    from ddpo_workflow.flows.flow import without_heartbeats
    from ddpo_workflow.flows.rescore import chosen_epochs
    from ddpo_workflow.flows.rescore import rescore as rescore_flow

    place = storage_root(root)
    run = saved_run(run_id, root)
    parameters = read_parameters(param or ())
    load_reward(reward, parameters)
    chosen = chosen_epochs(run, epochs)
    hide_loading_bars()
    scored = "every shard that was scored is kept; the same command goes on"
    try:
        with (
            StopHandler(lambda: say(f"stopped; {scored}")),
            without_heartbeats(),
            console.status(f"scoring {len(chosen)} epochs"),
        ):
            start_server()
            reward_id = rescore_flow(run_id, reward, parameters, epochs, place)
    except Exception as error:
        console.print(f"[bold red]scoring failed: {type(error).__name__}[/]", highlight=False)
        say(str(error))
        say(scored)
        sys.exit(1)
    _show_rescored(run_id, reward, reward_id, place)


@app.command()
def fork(
    run_id: RunId,
    epoch: Annotated[
        int, typer.Option(help="The new run starts before this epoch, on its samples.", min=0)
    ],
    reward: Annotated[
        str | None, typer.Option(help="The new run's reward. By default the same.")
    ] = None,
    param: Parameters = None,
    set_: Settings = None,
    fork_id: Annotated[
        str | None, typer.Option("--run-id", help="The new run's name; one that exists goes on.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="How many it is to have in the end, those before it counted.", min=1),
    ] = None,
    reset_statistics: Annotated[
        bool,
        typer.Option(
            "--reset-statistics",
            help="Start without prompt statistics, instead of scoring the epochs before again.",
        ),
    ] = False,
    root: Root = None,
) -> None:
    """Start a run from another's checkpoint and saved samples, under another reward or settings."""
    from ddpo.runs.run import check_run, storage_root
    from ddpo_workflow.flows.fork import fork as fork_flow
    from ddpo_workflow.flows.fork import forked_config, named_fork
    from ddpo_workflow.tasks.tracking.connection import connect

    place = storage_root(root)
    parent = saved_run(run_id, root)
    parameters = read_parameters(param or ())
    statistics = "reset" if reset_statistics else "rebuild"
    settings = tuple(set_ or ())
    console.print("[dim]checking model, store and tracking ...[/]")
    config = forked_config(
        parent,
        epoch,
        reward=reward,
        parameters=parameters,
        epochs=epochs,
        statistics=statistics,
        overrides=settings,
    )
    name = named_fork(parent, config, fork_id)
    store, _ = check_run(config, name)
    connect(config.tracking.uri)
    show_run(
        name,
        config.epochs,
        lambda: fork_flow(
            run_id, epoch, reward, parameters, name, epochs, statistics, settings, place
        ),
        store,
    )


@app.command()
def compare(
    config: ConfigFile,
    name: Annotated[
        str | None,
        typer.Option(help="The comparison's; one that exists goes on. By default the file's."),
    ] = None,
    set_: Settings = None,
    root: Root = None,
) -> None:
    """Compare algorithms on shared first samples, by as many reward queries each, over seeds."""
    from ddpo.analysis.comparison.plan import read_comparison
    from ddpo.runs.run import storage_root
    from ddpo.store.objects import Store
    from ddpo_workflow.flows.cli.bars import Bars
    from ddpo_workflow.flows.cli.signals import StopHandler, start_server
    from ddpo_workflow.flows.compare import check_comparison, total_epochs
    from ddpo_workflow.flows.compare import compare as compare_flow
    from ddpo_workflow.flows.flow import without_heartbeats
    from ddpo_workflow.tasks.progress import shown_by

    changes = overrides(set_, root)
    comparison = read_comparison(config, name, changes)
    console.print("[dim]checking model, store and tracking ...[/]")
    check_comparison(comparison)
    hide_loading_bars()
    kept = "what is committed is kept; the same command goes on"
    bars = Bars(console, comparison.name, total_epochs(comparison))
    try:
        with (
            StopHandler(lambda: say(f"stopped; {kept}")),
            without_heartbeats(),
            bars,
            shown_by(bars),
        ):
            start_server()
            compare_flow(config, name, overrides=changes)
    except Exception as error:
        console.print(f"[bold red]the comparison failed: {type(error).__name__}[/]")
        say(str(error))
        say(kept)
        sys.exit(1)
    storage = comparison.members[0].config.storage
    _show_comparison(comparison, Store.open(storage_root(storage.root), storage.s3))


def _show_comparison(comparison: Comparison, store: Store) -> None:
    """Print what a comparison found, and where it is."""
    from ddpo.analysis.comparison.report import (
        MARKDOWN,
        PLOT,
        explanation,
        ratio_table,
        result_table,
    )
    from ddpo.analysis.comparison.result import read_result
    from ddpo.basics.redaction import hide_credentials
    from ddpo_workflow.flows.compare import comparison_folder

    result = read_result(comparison, store)
    console.print(_table(result_table(comparison, result), comparison.name))
    if result.ratios:
        console.print(_table(ratio_table(result), "importance ratios on the shared history"))
    for paragraph in explanation(comparison):
        console.print(paragraph, style="dim", markup=False, highlight=False)
    folder = comparison_folder(comparison)
    places = Table.grid(padding=(0, 2))
    places.add_column()
    places.add_column(overflow="fold")
    places.add_row("page", str(folder / MARKDOWN))
    places.add_row("plot", str(folder / PLOT))
    places.add_row("store", store.root)
    places.add_row("MLflow", hide_credentials(comparison.members[0].config.tracking.uri))
    console.print(places)


def _table(cells: Cells, title: str) -> Table:
    headings, rows = cells
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _show_rescored(run_id: str, reward: str, reward_id: str, place: str) -> None:
    """Print both rewards by epoch, and where the new one is."""
    from ddpo.analysis.history import open_run
    from ddpo.basics.redaction import hide_credentials

    history = open_run(place, run_id)
    own = history.config.reward.name
    means = {
        name: {
            epoch: _mean(history.samples(name, epochs=[epoch]).column("reward").to_pylist())
            for epoch in history.epochs
            if epoch not in history.retired_epochs
        }
        for name in (None, reward_id)
    }
    table = Table("epoch", own, reward, title=run_id, title_justify="left")
    for epoch, mean in means[None].items():
        table.add_row(str(epoch), mean, means[reward_id][epoch])
    console.print(table)
    places = Table.grid(padding=(0, 2))
    places.add_column()
    places.add_column(overflow="fold")
    places.add_row("scores", f"{place}/rewards/reward_name={reward_id}/run_id={run_id}")
    places.add_row("MLflow", hide_credentials(history.config.tracking.uri))
    console.print(places)


def _mean(rewards: list[float | None]) -> str:
    scored = [reward for reward in rewards if reward is not None]
    return f"{sum(scored) / len(scored):.4g}" if scored else ""
