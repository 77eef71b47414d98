"""Trains the starter model and its judge: `python -m ddpo.starter.train`.

After a kill the same command with `--resume` continues, and ends in the same bytes as a run that
was never killed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ddpo.starter import JUDGE_PATH, STARTER_PATH
from ddpo.starter.export import export
from ddpo.starter.loop import Budget, console
from ddpo.starter.report import write_report
from ddpo.starter.stages.autoencoder import encode_latents, train_vae
from ddpo.starter.stages.generator import train_unet
from ddpo.starter.stages.judge import train_judge
from ddpo.starter.stages.pictures import draw_pictures
from ddpo.starter.work import Recipe, WorkFolder

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Stage:
    """A part of the plan.

    Attributes:
        name: in the journal and on the screen.
        run: does it, from where it stands.
        pictures: how many it handles, by the recipe.
        ms: milliseconds a picture, as measured on two shared cores of an AMD EPYC (Zen 4).
    """

    name: str
    run: Callable[[WorkFolder, Recipe], None]
    pictures: Callable[[Recipe], int]
    ms: float


PLAN = (
    Stage("pictures", draw_pictures, lambda recipe: 2 * recipe.cached_pictures, 0.5),
    Stage("autoencoder", train_vae, lambda recipe: recipe.vae.pictures, 10.5),
    Stage("judge", train_judge, lambda recipe: recipe.judge.pictures, 5.1),
    Stage("latents", encode_latents, lambda recipe: recipe.cached_pictures, 1.0),
    Stage("generator", train_unet, lambda recipe: recipe.unet.pictures, 6.0),
)


def show_plan(recipe: Recipe, done: set[str]) -> None:
    """Prints the stages, what they will take, and which are done.

    Args:
        recipe: what to train.
        done: names of finished stages.
    """
    table = Table("stage", "pictures", "minutes, about", "", title="The plan")
    left_min = 0.0
    for stage in PLAN:
        pictures = stage.pictures(recipe)
        minutes = pictures * stage.ms / 60_000
        left_min += 0 if stage.name in done else minutes
        state = "done" if stage.name in done else ""
        table.add_row(stage.name, f"{pictures:,}", f"{minutes:.1f}", state)
    console.print(table)
    console.print(f"About {left_min:.0f} minutes to go, on two CPU cores; --resume after a stop.")


def train(work: WorkFolder, recipe: Recipe, out: Path, judge_out: Path, resume: bool) -> None:
    """Runs all stages, each from where it stands, then exports and reports.

    Args:
        work: folder of caches and checkpoints.
        recipe: what to train.
        out: folder of the pipeline that comes out.
        judge_out: folder of the judge that comes out.
        resume: whether to continue the run in the work folder.
    """
    work.claim(recipe, resume)
    show_plan(recipe, set(work.read_journal()))
    for stage in PLAN:
        if stage.name not in work.read_journal():
            started = time.monotonic()
            stage.run(work, recipe)
            work.note(stage.name, time.monotonic() - started)
    export(work, recipe, out, judge_out)
    write_report(work, recipe, out)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Caches and checkpoints.")] = Path(".starter-work"),
    out: Annotated[Path, typer.Option(help="The pipeline's folder.")] = STARTER_PATH,
    judge_out: Annotated[Path, typer.Option(help="The judge's folder.")] = JUDGE_PATH,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    cached_pictures: Annotated[int, typer.Option(help="Different pictures drawn.")] = 60_000,
    vae_pictures: Annotated[int, typer.Option(help="Seen by the autoencoder.")] = 144_000,
    judge_pictures: Annotated[int, typer.Option(help="Seen by the judge.")] = 112_000,
    unet_pictures: Annotated[int, typer.Option(help="Seen by the noise predictor.")] = 600_000,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --work.")] = False,
    export_only: Annotated[
        bool, typer.Option("--export", help="Only export the latest checkpoints of --work.")
    ] = False,
) -> None:
    """Trains the starter model and its judge, resumes that, or exports what there is so far."""
    folder = WorkFolder(work)
    if export_only:
        export(folder, folder.read_recipe(), out, judge_out)
        return
    recipe = Recipe(
        seed=seed,
        cached_pictures=cached_pictures,
        vae=Budget(vae_pictures, 16, lr=2e-3),
        judge=Budget(judge_pictures, 64, lr=1e-3),
        unet=Budget(unet_pictures, 64, lr=1.5e-3),
    )
    train(folder, recipe, out, judge_out, resume)


if __name__ == "__main__":
    app()
