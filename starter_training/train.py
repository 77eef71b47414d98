"""Train the starter model and its judge: `python -m starter_training.train`.

With `--flow`, train the flow-matching one on the shipped starter's autoencoder.

If it is killed, the same command with `--resume` continues, and ends in the same bytes as a run
that was never killed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ddpo.starter import FLOW_STARTER_PATH, JUDGE_PATH, STARTER_PATH
from starter_training.export import export, export_flow
from starter_training.loop import Budget, console, saved_step
from starter_training.report import write_report
from starter_training.stages.autoencoder import encode_latents, train_vae
from starter_training.stages.flow_generator import encode_by_shipped, train_flow
from starter_training.stages.generator import train_unet
from starter_training.stages.judge import train_judge
from starter_training.stages.pictures import draw_generator_pictures, draw_pictures
from starter_training.work import FlowRecipe, Recipe, WorkFolder, WorkFolderError, source_commit

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Stage:
    """A part of a plan, for one kind of recipe."""

    name: str
    """In the journal and on the screen."""
    run: Callable[[WorkFolder, Any], None]
    """Does the work, continuing from the stage's checkpoint."""
    pictures: Callable[[Any], int]
    """Number of images that it processes, by the recipe."""
    ms: float
    """Milliseconds per image, measured on two shared cores of an AMD EPYC (Zen 4)."""
    checkpoint: Callable[[WorkFolder, Any], tuple[Path, Budget]] | None = None
    """Checkpoint and budget of a stage that trains."""

    def left(self, work: WorkFolder, recipe: Recipe | FlowRecipe) -> int:
        """Return how many images remain, according to the latest checkpoint."""
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

FLOW_PLAN = (
    Stage("pictures", draw_generator_pictures, lambda recipe: recipe.cached_pictures, 0.5),
    Stage("latents", encode_by_shipped, lambda recipe: recipe.cached_pictures, 1.0),
    Stage(
        "flow generator",
        train_flow,
        lambda recipe: recipe.flow.pictures,
        9.0,
        lambda work, recipe: (work.flow, recipe.flow),
    ),
)

EXPORT_MIN = 2.0
"""Minutes for export, evaluation and report at the end."""


def plan_of(recipe: Recipe | FlowRecipe) -> tuple[Stage, ...]:
    """Return the stages of a recipe, in their order."""
    return FLOW_PLAN if isinstance(recipe, FlowRecipe) else PLAN


def show_plan(recipe: Recipe | FlowRecipe, left: Mapping[str, int]) -> None:
    """Print the stages and how long they will take.

    Args:
        recipe: What to train.
        left: Images that remain for each stage, by name; 0 if it is done.
    """
    table = Table("stage", "images", "left", "minutes left, about", title="The plan")
    total_min = EXPORT_MIN
    for stage in plan_of(recipe):
        minutes = left[stage.name] * stage.ms / 60_000
        total_min += minutes
        shown = f"{left[stage.name]:,}" if left[stage.name] else "done"
        table.add_row(stage.name, f"{stage.pictures(recipe):,}", shown, f"{minutes:.1f}")
    table.add_row("export and report", "", "", f"{EXPORT_MIN:.1f}")
    console.print(table)
    console.print(
        f"About {total_min:.0f} minutes left on two CPU cores; --resume continues after a stop."
    )


def train(work: WorkFolder, recipe: Recipe, out: Path, judge_out: Path, resume: bool) -> None:
    """Run all stages that are not done, then export and report.

    Args:
        work: Folder of caches and checkpoints.
        recipe: What to train.
        out: Destination of the pipeline.
        judge_out: Destination of the judge.
        resume: Whether to resume the run in the work folder.
    """
    run_stages(work, recipe, resume)
    export(work, recipe, out, judge_out)
    write_report(work, recipe, out)


def run_stages(work: WorkFolder, recipe: Recipe | FlowRecipe, resume: bool) -> None:
    """Run all stages that are not done.

    Args:
        work: Folder of caches and checkpoints.
        recipe: What to train.
        resume: Whether to resume the run in the work folder.
    """
    work.claim(recipe, resume)
    commit = source_commit()  # now, since files may change while the stages run
    finished, plan = work.finished(), plan_of(recipe)
    left = {stage.name: stage.left(work, recipe) for stage in plan}
    show_plan(recipe, {**left, **dict.fromkeys(finished, 0)})
    for stage in plan:
        if stage.name not in finished:
            with work.noting(stage.name, commit):
                stage.run(work, recipe)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Caches and checkpoints.")] = Path(".starter-work"),
    out: Annotated[
        Path | None,
        typer.Option(help="The pipeline's folder; by default where it ships."),
    ] = None,
    judge_out: Annotated[Path, typer.Option(help="The judge's folder.")] = JUDGE_PATH,
    seed: Annotated[int, typer.Option(help="Seed of all randomness.")] = 0,
    cached_pictures: Annotated[int, typer.Option(help="Distinct images rendered.")] = 60_000,
    vae_pictures: Annotated[int, typer.Option(help="Images seen by the autoencoder.")] = 144_000,
    judge_pictures: Annotated[int, typer.Option(help="Images seen by the judge.")] = 112_000,
    unet_pictures: Annotated[
        int, typer.Option(help="Images seen by the noise predictor.")
    ] = 600_000,
    flow: Annotated[
        bool,
        typer.Option("--flow", help="Train the flow-matching starter instead."),
    ] = False,
    flow_pictures: Annotated[
        int, typer.Option(help="Images seen by the velocity predictor.")
    ] = 128_000,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --work.")] = False,
    export_only: Annotated[
        bool,
        typer.Option("--export", help="Only export what --work has so far."),
    ] = False,
) -> None:
    """Train the starter model and its judge, resume, or export what there is so far."""
    folder = WorkFolder(work)
    try:
        if export_only:
            recipe = folder.read_recipe()
        elif flow:
            recipe = FlowRecipe(seed, cached_pictures, Budget(flow_pictures, 32, lr=1e-3))
        else:
            recipe = Recipe(
                seed=seed,
                cached_pictures=cached_pictures,
                vae=Budget(vae_pictures, 16, lr=2e-3),
                judge=Budget(judge_pictures, 64, lr=1e-3),
                unet=Budget(unet_pictures, 64, lr=1.5e-3),
            )
        if isinstance(recipe, FlowRecipe):
            if not export_only:
                run_stages(folder, recipe, resume)
            export_flow(folder, recipe, out or FLOW_STARTER_PATH)
        elif export_only:
            export(folder, recipe, out or STARTER_PATH, judge_out)
        else:
            train(folder, recipe, out or STARTER_PATH, judge_out, resume)
    except (WorkFolderError, ValueError) as error:
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
