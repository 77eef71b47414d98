"""From checkpoints to the folders that ship."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starter_training.loop import console, load_ema, write_json
from starter_training.measure import measure
from starter_training.networks import Denoiser, assemble
from starter_training.trained import trained_judge, trained_vae
from starter_training.work import Recipe, WorkFolder, WorkFolderError


@contextmanager
def _replacing_folder(destination: Path) -> Iterator[Path]:
    """Gives a folder to fill, and puts it in the old one's place at the end."""
    fresh = destination.with_name(destination.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for weights in fresh.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors lets only the owner read, also once installed
    old = destination.with_name(destination.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.replace(old)
    fresh.replace(destination)
    shutil.rmtree(old, ignore_errors=True)


def export(work: WorkFolder, recipe: Recipe, pipeline_folder: Path, judge_folder: Path) -> None:
    """Writes the averaged weights of the latest checkpoints, in place of the old folders.

    Autoencoder and noise predictor are stored in float16, which halves the folder, and load as
    float32.

    Args:
        work: a training run that has come at least to the first checkpoint of the last stage.
        recipe: of the run; stored beside the weights with what is known of its stages.
        pipeline_folder: gets the pipeline.
        judge_folder: gets the judge.

    Raises:
        WorkFolderError: the run has not come that far.
    """
    if not work.unet.exists():
        raise WorkFolderError(
            f"{work.unet} does not exist: train on (with --resume) until the generator stage has "
            "saved its first checkpoint, then export"
        )
    denoiser = Denoiser()
    step = load_ema(denoiser, work.unet)
    # Figures are of what ships: rounded to float16.
    vae, judge = trained_vae(work).half().float(), trained_judge(work)
    record = {
        "command": recipe.command,
        "recipe": recipe.as_json(),
        "stages": work.read_journal(),
        "unet_pictures_seen": step * recipe.unet.batch,
        "figures": measure(vae, judge, recipe.seed),
    }
    # Not the text encoder: transformers would load it as float16, diffusers loads float32.
    pipeline = assemble(vae.half(), denoiser)
    denoiser.unet.half()
    with _replacing_folder(pipeline_folder) as fresh:
        pipeline.save_pretrained(fresh, safe_serialization=True)
        write_json(fresh / "training.json", record)
    with _replacing_folder(judge_folder) as fresh:
        judge.save(fresh)
        write_json(fresh / "training.json", record)
    console.log(f"exported step {step} of the generator to {pipeline_folder}")
