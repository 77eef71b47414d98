"""`ddpo train`, `resume`, `runs` and `sample`: runs, what is shown of them, their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ddpo_workflow.flows.cli.common import (
    ConfigFile,
    Root,
    RunId,
    Settings,
    console,
    overrides,
    saved_run,
)
from ddpo_workflow.flows.cli.quiet import hide_loading_bars
from ddpo_workflow.flows.cli.running import show_run

if TYPE_CHECKING:
    from ddpo.store.objects import Store

app = typer.Typer()


@app.command()
def train(
    config: ConfigFile,
    set_: Settings = None,
    run_id: Annotated[
        str | None, typer.Option(help="The run's name; one that exists goes on.")
    ] = None,
    root: Root = None,
) -> None:
    """Fine-tune a model on a reward, or go on with a run."""
    from ddpo.config.files import read_config

    changes = overrides(set_, root)
    settings = read_config(config, changes)
    console.print("[dim]checking model, store and tracking ...[/]")

    from ddpo.analysis.comparison.plan import check_not_shared
    from ddpo.runs.run import check_run
    from ddpo_workflow.flows.train import new_run_id
    from ddpo_workflow.flows.train import train as train_flow
    from ddpo_workflow.tasks.tracking.connection import connect

    run_id = run_id or new_run_id(config)
    store, _ = check_run(settings, run_id)
    check_not_shared(store, run_id)
    connect(settings.tracking.uri)
    show_run(run_id, settings.epochs, lambda: train_flow(config, run_id, overrides=changes), store)


@app.command()
def resume(
    run_id: RunId,
    epochs: Annotated[
        int | None, typer.Option(help="How many epochs it is to have in the end.", min=1)
    ] = None,
    root: Root = None,
) -> None:
    """Go on with a run that was stopped; what is committed is not done again."""
    from ddpo.analysis.comparison.plan import check_not_shared
    from ddpo.config.s3 import S3Options
    from ddpo.runs.run import check_run, storage_root
    from ddpo_workflow.flows.train import resume as resume_flow
    from ddpo_workflow.tasks.tracking.connection import connect

    place = storage_root(root)
    run = saved_run(run_id, place)
    check_not_shared(run.store, run_id)
    config = run.config
    # Found by `--root` and the AWS variables, and not by what an earlier start was told.
    storage = config.storage.model_copy(update={"root": place, "s3": S3Options()})
    store, _ = check_run(config.model_copy(update={"storage": storage}), run_id)
    connect(config.tracking.uri)
    total = epochs or config.epochs
    show_run(run_id, total, lambda: resume_flow(run_id, place, epochs), store)


@app.command()
def runs(
    tree: Annotated[
        bool, typer.Option("--tree", help="Show which runs branch off which instead.")
    ] = False,
    root: Root = None,
) -> None:
    """List the runs of a store."""
    from ddpo.analysis.report import reward_curve
    from ddpo.runs.run import storage_root
    from ddpo.store.objects import Store
    from ddpo.store.runs import list_runs

    store = Store.open(storage_root(root))
    if tree:
        _show_tree(store)
        return
    table = Table("run", "model", "reward", "epochs", "first", "last", title=store.root)
    for run_id in list_runs(store):
        run = saved_run(run_id, root)
        curve = reward_curve(run)
        first, last = (f"{curve[0].mean:.4g}", f"{curve[-1].mean:.4g}") if curve else ("", "")
        epochs = f"{run.first_epoch + len(curve)}/{run.config.epochs}"
        table.add_row(run_id, run.config.model.path, run.config.reward.name, epochs, first, last)
    console.print(table if table.row_count else f"no runs in {store.root}")


def _show_tree(store: Store) -> None:
    """Print each run below the run that it branches off."""
    from rich.tree import Tree

    from ddpo.runs.run import open_run
    from ddpo.store.runs import list_runs

    found = {run_id: open_run(store, run_id).config for run_id in list_runs(store)}
    tree = Tree(Text(store.root))
    branches: dict[str, Tree] = {}

    def grow(run_id: str) -> Tree:
        if run_id not in branches:
            config = found[run_id]
            fork = config.fork
            above = grow(fork.run_id) if fork and fork.run_id in found else tree
            since = f", from epoch {fork.epoch} of {fork.run_id}" if fork else ""
            said = Text.assemble((run_id, "bold"), f"  {config.reward.name}{since}")
            branches[run_id] = above.add(said)
        return branches[run_id]

    for run_id in found:
        grow(run_id)
    console.print(tree)


@app.command()
def sample(
    run_id: RunId,
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="The picture to write, a .png.")],
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0)] = 0,
    checkpoint: Annotated[
        int | None, typer.Option(help="Epochs trained; 0 is the base model. By default the last.")
    ] = None,
    root: Root = None,
) -> None:
    """Draw a picture with a run's model."""
    from ddpo.analysis.sample_image import draw
    from ddpo.errors import ConfigError

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} does not end in .png, which is what is written")
    hide_loading_bars()
    picture = draw(saved_run(run_id, root), prompt, seed=seed, checkpoint=checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    console.print(f"{out}: '{prompt}', seed {seed}")
