"""`ddpo runs`, `show`, `watch` and `diff`: look at runs, from any terminal that has the store."""

from __future__ import annotations

import json
import signal
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ddpo_workflow.flows.cli.common import Root, RunId
from ddpo_workflow.flows.cli.screen import busy, say, show, show_places, visible
from ddpo_workflow.flows.messages import resume_command, ui_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddpo.analysis.listing import ListedRun, UnreadableRun
    from ddpo.analysis.overview import Overview
    from ddpo.analysis.rewards import EpochRewards
    from ddpo.store.objects import Store

app = typer.Typer()

_BAR = 32  # characters
_EVERY_S = 5.0
_LAST = 5  # epochs that are shown of what was before

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with the same keys always.")]


class Sort(StrEnum):
    """The order of the list of runs."""

    NAME = "name"
    STARTED = "started"
    REWARD = "reward"
    EPOCH = "epoch"


@app.command()
def runs(
    sort: Annotated[
        Sort,
        typer.Option(
            help="By name; or the latest, the highest last reward, the most epochs first."
        ),
    ] = Sort.NAME,
    wide: Annotated[bool, typer.Option("--wide", help="Show more columns.")] = False,
    tree: Annotated[bool, typer.Option("--tree", help="Show forks below their parents.")] = False,
    as_json: AsJson = False,
    root: Root = None,
) -> None:
    """List the runs of a store."""
    from ddpo.analysis.listing import list_runs

    store = _store(root)
    found = list_runs(store, sort.value)
    if as_json:
        _print_json([run.as_json() for run in found])
    elif not found:
        say(f"no runs in {store.root}")
    elif tree:
        _show_tree(store, found)
    else:
        say(store.root)
        _show_list(found, wide=wide)


@app.command("show")
def show_run(run_id: RunId, as_json: AsJson = False, root: Root = None) -> None:
    """Show a run: its state, settings and curve, where its results are, how to resume it."""
    from ddpo.analysis.evaluation.champion import champion_text, latest_champion
    from ddpo.analysis.overview import overview

    found = overview(_store(root), run_id)
    commands = _commands(found)
    if as_json:
        champion = latest_champion(found.run)
        epoch = champion.epoch if champion else None
        _print_json({**found.as_json(), "champion": epoch, "commands": commands})
        return
    say(run_id, style="bold")
    say(str(found.state))
    fork = found.run.fork
    if fork:
        say(f"forked from {fork.parent_id} at epoch {fork.epoch}")
    if found.forks:
        say(f"its forks: {', '.join(found.forks)}")
    table = Table("setting", "value")
    for name, value in found.settings.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value))
    show(table, fold=True)
    if found.curve:
        show(_curve_table(found.curve))
    if found.run.config.evaluation:
        say(champion_text(found.run))
    names = {"mlflow": "MLflow", "mlflow_experiment": "experiment"}
    places = {names.get(name, name): place for name, place in found.places.items()}
    show_places(places | commands)


@app.command()
def watch(
    run_id: RunId,
    every: Annotated[
        float, typer.Option(help="Seconds between two looks at the store.", min=_EVERY_S)
    ] = _EVERY_S,
    root: Root = None,
) -> None:
    """Follow a run from another terminal, a line an epoch, until it is complete or has stopped.

    The exit status is 0 if it finished, 1 if it stopped or failed. Ctrl-C leaves the run alone.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background
    try:
        found = _follow(_store(root), run_id, every)
    except KeyboardInterrupt:
        say("no longer watching; the run continues")
        sys.exit(130)
    if found.state.word != "finished":
        for name, command in _commands(found).items():
            say(f"{name}: {command}")
        sys.exit(1)


@app.command()
def diff(
    run_id: RunId,
    other: Annotated[str, typer.Argument(help="The run to compare it with.")],
    as_json: AsJson = False,
    root: Root = None,
) -> None:
    """Show how two runs differ: settings, versions, and their curves side by side."""
    from ddpo.analysis.overview import RunDifference, chosen_rows, overview

    store = _store(root)
    found = RunDifference(overview(store, run_id), overview(store, other))
    if as_json:
        _print_json(found.as_json())
        return
    table = Table("", "setting", run_id, other)
    for part, settings in found.settings.items():
        for each in settings:
            table.add_row(part, each.key, each.stored, each.wanted)
    if table.row_count:
        show(table, fold=True)
    else:
        say("no setting differs")
    curves = found.curves
    table = Table("epoch", run_id, other, "difference")
    for row in chosen_rows(len(curves)):
        epoch, one, two = curves[row]
        change = "" if one is None or two is None else f"{two - one:+.4g}"
        table.add_row(str(epoch), _number(one), _number(two), change)
    if curves:
        show(table)


def _follow(store: Store, run_id: str, every_s: float) -> Overview:
    """Print a run's epochs as they are committed; return it once it has ended."""
    from ddpo.analysis.overview import overview
    from ddpo.basics.outages import PATIENCE_S

    store = store.patient(PATIENCE_S)
    found = overview(store, run_id)
    before = found.state
    say(f"{run_id}: {before}")
    shown = max(len(found.curve) - _LAST, 0)
    with busy("") as update:
        while True:
            for point in found.curve[shown:]:
                say(_line(point, found))
            shown = len(found.curve)
            if found.state.word != "running":
                break
            update(f"{found.state}; Ctrl-C leaves")
            time.sleep(every_s)
            found = overview(store, run_id, found.curve)
    if found.state != before:
        say(str(found.state))
    return found


def _line(point: EpochRewards, found: Overview) -> str:
    text = f"epoch {point.epoch + 1} of {found.state.epochs}: mean reward {point.mean:.4g}"
    text += f", standard deviation {point.std:.4g}"
    return f"{text}, {point.failed} of {point.samples} failed" if point.failed else text


def _show_list(found: Sequence[ListedRun | UnreadableRun], *, wide: bool) -> None:
    headings = ["run", "model", "reward", "epochs", "first", "last", "state"]
    more = ["algorithm", "prompts", "learning rate", "seed", "started (UTC)", "parent"]
    table = Table(*headings, *(more if wide else ()))
    for run in found:
        row = run.as_json()
        if row["error"]:
            table.add_row(run.run_id, f"unreadable: {row['error']}")
            continue
        cells = [
            *(row["run_id"], row["model"], row["reward"], f"{row['epoch']}/{row['epochs']}"),
            *(_number(row["first_reward"]), _number(row["last_reward"]), row["state"]),
        ]
        if wide:
            started = (row["started"] or "")[:19].replace("T", " ")
            parent = f"{row['parent']} at {row['forked_at']}" if row["parent"] else ""
            cells += [row["algorithm"], row["prompts"], f"{row['learning_rate']:g}"]
            cells += [str(row["seed"]), started, parent]
        table.add_row(*cells)
    show(table)


def _show_tree(store: Store, found: Sequence[ListedRun | UnreadableRun]) -> None:
    """Print each fork below its parent."""
    from rich.tree import Tree

    rows: dict[str, dict[str, Any]] = {run.run_id: run.as_json() for run in found}
    tree = Tree(Text(visible(store.root)))
    nodes: dict[str, Tree] = {}

    def node(run_id: str) -> Tree:
        if run_id not in nodes:
            row = rows[run_id]
            parent = row.get("parent")
            above = node(parent) if parent in rows else tree
            origin = f", from epoch {row['forked_at']} of {parent}" if parent else ""
            told = f"unreadable: {row['error']}" if row["error"] else row["reward"]
            nodes[run_id] = above.add(Text.assemble((run_id, "bold"), visible(f"  {told}{origin}")))
        return nodes[run_id]

    for run_id in rows:
        node(run_id)
    show(tree)


def _curve_table(curve: Sequence[EpochRewards]) -> Table:
    """Return a curve as a table with bars, from the lowest mean to the highest."""
    from ddpo.analysis.overview import chosen_rows, finite_mean

    means = [mean for mean in map(finite_mean, curve) if mean is not None]
    low, high = min(means, default=0.0), max(means, default=0.0)
    table = Table("epoch", "mean reward", "std", "")
    for row in chosen_rows(len(curve)):
        point, mean = curve[row], finite_mean(curve[row])
        share = 0.0 if mean is None or high == low else (mean - low) / (high - low)
        bar = "" if mean is None else "#" * (1 + round(share * (_BAR - 1)))
        table.add_row(str(point.epoch), _number(mean), f"{point.std:.4g}", bar)
    return table


def _commands(found: Overview) -> dict[str, str]:
    """Return the commands that go on with a run, by what they do."""
    from ddpo.config import TrackingConfig

    tracking = found.run.config.tracking
    return {
        "resume": resume_command(found.run.store, found.run.run_id),
        "look": ui_command(tracking.uri, TrackingConfig().uri),
    }


def _store(root: str | None) -> Store:
    from ddpo.runs.run import storage_root
    from ddpo.store.objects import Store

    return Store.open(storage_root(root))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _print_json(value: object) -> None:
    say(Text(json.dumps(value, indent=2, allow_nan=False)))
