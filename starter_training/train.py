"""Trains the starter model and its judge: `python -m starter_training.train`.

After a kill the same command with `--resume` continues, and ends in the same bytes as a run that
was never killed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ddpo.starter import JUDGE_PATH, STARTER_PATH
from starter_training.export import export
from starter_training.loop import Budget, console, saved_step
from starter_training.report import write_report
from starter_training.stages.autoencoder import encode_latents, train_vae
from starter_training.stages.generator import train_unet
from starter_training.stages.judge import train_judge
from starter_training.stages.pictures import draw_pictures
from starter_training.work import Recipe, WorkFolder, WorkFolderError, source_commit

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Stage:
    """A part of the plan.

    Attributes:
        name: in the journal and on the screen.
        run: does it, from where it stands.
        pictures: how many it handles, by the recipe.
        ms: milliseconds a picture, as measured on two shared cores of an AMD EPYC (Zen 4).
        checkpoint: of a stage that trains: where it saves, and its budget.
    """

    name: str
    run: Callable[[WorkFolder, Recipe], None]
    pictures: Callable[[Recipe], int]
    ms: float
    checkpoint: Callable[[WorkFolder, Recipe], tuple[Path, Budget]] | None = None

    def left(self, work: WorkFolder, recipe: Recipe) -> int:
        """Returns how many pictures are still to be handled, by the latest checkpoint."""
        if self.checkpoint is None:
            return self.pictures(recipe)
        path, budget = self.checkpoint(work, recipe)
        return (budget.steps - saved_step(path)) * budget.batch


PLAN = (
    Stage("pictures", draw_pictures, lambda recipe: 2 * recipe.cached_pictures, 0.5),
    Stage(
        "autoencoder",
        train_vae,
        lambda recipe: recipe.vae.pictures,
        10.6,
        lambda work, recipe: (work.vae, recipe.vae),
    ),
    Stage(
        "judge",
        train_judge,
        lambda recipe: recipe.judge.pictures,
        5.1,
        lambda work, recipe: (work.judge, recipe.judge),
    ),
    Stage("latents", encode_latents, lambda recipe: recipe.cached_pictures, 1.0),
    Stage(
        "generator",
        train_unet,
        lambda recipe: recipe.unet.pictures,
        6.5,
        lambda work, recipe: (work.unet, recipe.unet),
    ),
)

EXPORT_MIN = 2.0
"""Export, measurements and report at the end."""


def show_plan(recipe: Recipe, left: Mapping[str, int]) -> None:
    """Prints the stages and what they will take.

    Args:
        recipe: what to train.
        left: pictures that each stage has still to handle, by name; 0 where it is done.
    """
    table = Table("stage", "pictures", "left", "minutes left, about", title="The plan")
    total_min = EXPORT_MIN
    for stage in PLAN:
        minutes = left[stage.name] * stage.ms / 60_000
        total_min += minutes
        shown = f"{left[stage.name]:,}" if left[stage.name] else "done"
        table.add_row(stage.name, f"{stage.pictures(recipe):,}", shown, f"{minutes:.1f}")
    table.add_row("export and report", "", "", f"{EXPORT_MIN:.1f}")
    console.print(table)
    console.print(f"About {total_min:.0f} minutes to go, on two CPU cores; --resume after a stop.")


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
    commit = source_commit()  # now: files may change while the stages run
    finished = work.finished()
    left = {stage.name: stage.left(work, recipe) for stage in PLAN}
    show_plan(recipe, {**left, **dict.fromkeys(finished, 0)})
    for stage in PLAN:
        if stage.name not in finished:
            with work.noting(stage.name, commit):
                stage.run(work, recipe)
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
        bool,
        typer.Option("--export", help="Only export what --work has so far, by its recipe."),
    ] = False,
) -> None:
    """Trains the starter model and its judge, resumes that, or exports what there is so far."""
    folder = WorkFolder(work)
    try:
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
    except (WorkFolderError, ValueError) as error:
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
