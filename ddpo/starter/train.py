"""Trains the starter model: `python -m ddpo.starter.train`.

Draws pictures, trains the autoencoder, encodes the pictures, trains noise predictor and text
encoder, exports. After a kill the same command with `--resume` continues, and ends in the same
bytes as a run that was never killed.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from ddpo.starter import STARTER_PATH
from ddpo.starter.export import draw_sheet, export
from ddpo.starter.loop import Budget, console, write_json
from ddpo.starter.stages import (
    Recipe,
    WorkFolder,
    draw_pictures,
    encode_latents,
    train_unet,
    train_vae,
)

app = typer.Typer(add_completion=False)


class WorkFolderError(Exception):
    """The work folder holds another run, or one that was not meant to be continued."""


def claim(work: WorkFolder, recipe: Recipe, resume: bool) -> None:
    """Makes the work folder this run's own.

    Args:
        work: the folder.
        recipe: of this run.
        resume: whether to continue the run that lies there.

    Raises:
        WorkFolderError: the folder holds a run and `resume` is False, or one of another recipe.
    """
    if not work.recipe.exists():
        write_json(work.recipe, recipe.as_json())
        return
    found, asked = json.loads(work.recipe.read_text()), recipe.as_json()
    if not resume:
        raise WorkFolderError(
            f"{work.root} holds a run already: add --resume to continue it, or name another --work"
        )
    if found != asked:
        differing = {key: (found[key], asked[key]) for key in asked if found[key] != asked[key]}
        raise WorkFolderError(
            f"{work.root} holds a run of another recipe (found, asked): {differing}; "
            "resume it with its own options, or name another --work"
        )


def train(work: WorkFolder, recipe: Recipe, out: Path, resume: bool) -> None:
    """Runs all stages, each from where it stands.

    Args:
        work: folder of caches and checkpoints.
        recipe: what to train.
        out: folder of the pipeline that comes out.
        resume: whether to continue the run in the work folder.
    """
    claim(work, recipe, resume)
    draw_pictures(work, recipe)
    train_vae(work, recipe)
    encode_latents(work, recipe)
    train_unet(work, recipe)
    export(work, recipe, out)


def read_recipe(work: WorkFolder) -> Recipe:
    """Reads the recipe of the run in a work folder."""
    found = json.loads(work.recipe.read_text())
    return Recipe(**{**found, "vae": Budget(**found["vae"]), "unet": Budget(**found["unet"])})


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Caches and checkpoints.")] = Path(".starter-work"),
    out: Annotated[Path, typer.Option(help="The pipeline's folder.")] = STARTER_PATH,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    cached_pictures: Annotated[int, typer.Option(help="Different pictures drawn.")] = 40_000,
    vae_pictures: Annotated[int, typer.Option(help="Seen by the autoencoder.")] = 72_000,
    vae_batch: Annotated[int, typer.Option(help="Pictures a step.")] = 16,
    unet_pictures: Annotated[int, typer.Option(help="Seen by the noise predictor.")] = 72_000,
    unet_batch: Annotated[int, typer.Option(help="Pictures a step.")] = 32,
    compile: Annotated[bool, typer.Option(help="Needs a C++ compiler; a third faster.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --work.")] = False,
    export_only: Annotated[
        bool, typer.Option("--export", help="Only export the latest checkpoints of --work.")
    ] = False,
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Only draw every animal of --out, beside it.")
    ] = False,
) -> None:
    """Trains the starter model, resumes its training, exports it, or draws its contact sheet."""
    folder = WorkFolder(work)
    if sheet:
        draw_sheet(out, out.parent / "contact_sheet.png")
    elif export_only:
        export(folder, read_recipe(folder), out)
    else:
        recipe = Recipe(
            seed=seed,
            cached_pictures=cached_pictures,
            vae=Budget(vae_pictures, vae_batch, lr=2e-3),
            unet=Budget(unet_pictures, unet_batch, lr=1.5e-3),
            compile=compile,
        )
        console.log(f"training in {work}: {recipe}")
        train(folder, recipe, out, resume)


if __name__ == "__main__":
    app()
