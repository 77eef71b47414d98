"""`ddpo query`, `export` and `export-lora`: read a run as data, take its LoRA home."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ddpo_workflow.flows.cli.common import Epochs, Root, RunId, saved_run
from ddpo_workflow.flows.cli.quiet import hide_loading_bars
from ddpo_workflow.flows.cli.screen import busy, say, show

if TYPE_CHECKING:
    from ddpo.analysis.history import History
    from ddpo.analysis.query import Answer

app = typer.Typer()
_MOST_ROWS = 200  # printed to the screen


@app.command()
def query(
    run_id: RunId,
    sql: Annotated[
        str,
        typer.Argument(
            help="One SQL statement over the tables samples (rollouts joined with scores of the "
            "run's own reward), rollouts, rewards and advantages."
        ),
    ],
    csv: Annotated[
        Path | None, typer.Option(help="Write all rows to this file instead.", dir_okay=False)
    ] = None,
    root: Root = None,
) -> None:
    """Query a run's samples, scores and advantages in SQL (DuckDB)."""
    from ddpo.analysis.query import format_value
    from ddpo.analysis.query import query as ask

    with ask(_history(run_id, root), sql) as answer:
        if csv is not None:
            count = _write_csv(csv, answer)
            say(f"{csv}: {count} rows")
            return
        table = Table(*answer.columns)
        for row in itertools.islice(answer.rows, _MOST_ROWS):
            table.add_row(*map(format_value, row))
        cut = next(answer.rows, None) is not None
    show(table, fold=True)
    if cut:
        say(f"showing the first {_MOST_ROWS} rows; --csv FILE writes all")


@app.command()
def export(
    run_id: RunId,
    to_hf_dataset: Annotated[
        Path,
        typer.Option(
            "--to-hf-dataset",
            help="Folder for the Hugging Face dataset; must be absent or empty.",
        ),
    ],
    epochs: Epochs = None,
    reward: Annotated[
        str | None,
        typer.Option(help="Name or id of the reward to export. By default the run's own."),
    ] = None,
    root: Root = None,
) -> None:
    """Write a run's images, prompts and scores as a Hugging Face dataset."""
    from ddpo.analysis.hf_dataset import write_dataset

    history = _history(run_id, root)
    chosen = None if epochs is None else history.epochs_within(epochs)
    with busy("writing"):
        count = write_dataset(history, to_hf_dataset, epochs=chosen, reward=reward)
    say(f"{to_hf_dataset}: {count} samples")


@app.command("export-lora")
def export_lora(
    run_id: RunId,
    out: Annotated[
        Path,
        typer.Option(help="The folder to write; absent, empty, or an earlier export of the run."),
    ],
    epoch: Annotated[
        int | None,
        typer.Option(help="The checkpoint after this many epochs. By default the last.", min=0),
    ] = None,
    champion: Annotated[
        bool,
        typer.Option("--champion", help="The best evaluated checkpoint; see `ddpo evaluate`."),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            help="Upload the folder to this repository of the Hugging Face Hub, owner/name; a new "
            "one is private.",
        ),
    ] = None,
    root: Root = None,
) -> None:
    """Write a run's LoRA for diffusers, ComfyUI and AUTOMATIC1111, with a model card."""
    from ddpo.analysis.lora_plan import plan_export
    from ddpo.errors import ConfigError

    run = saved_run(run_id, root)
    if champion and epoch is not None:
        raise ConfigError("--epoch and --champion each name a checkpoint; give one of them")
    plan = plan_export(run, out, epoch=epoch, champion=champion, repository=push_to_hub)
    if push_to_hub is not None:
        from ddpo.analysis.hub_upload import check_repository

        check_repository(push_to_hub)
    from ddpo.analysis.lora_export import write_export  # imports torch

    hide_loading_bars()
    with busy("writing"):
        write_export(plan)
    say(f"{out}: {run_id} after {plan.epoch} epochs; {out / 'README.md'} says how to load it")
    if push_to_hub is not None:
        from ddpo.analysis.hub_upload import upload

        with busy("uploading"):
            message = f"{run_id} after {plan.epoch} epochs"
            address = upload(push_to_hub, out, plan.files, message)
        say(f"uploaded to {address}")


def _write_csv(file: Path, answer: Answer) -> int:
    """Write all rows of an answer, with full precision; return their number."""
    import csv

    from ddpo.analysis.query import format_value
    from ddpo.errors import ConfigError

    count = 0
    try:
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(answer.columns)
            for row in answer.rows:
                writer.writerow([format_value(value, digits=None) for value in row])
                count += 1
    except OSError as error:
        raise ConfigError(f"--csv {file} cannot be written: {error.strerror}") from error
    return count


def _history(run_id: str, root: str | None) -> History:
    from ddpo.analysis.history import open_history
    from ddpo.runs import storage_root

    return open_history(storage_root(root), run_id)
