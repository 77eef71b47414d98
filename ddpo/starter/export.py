"""From checkpoints to the folder that ships, and a sheet of what it draws."""

import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from ddpo.starter.glyphs import ANIMALS
from ddpo.starter.loop import console, load_ema, write_json
from ddpo.starter.networks import Denoiser, assemble, build_vae, whiten
from ddpo.starter.render import SIZE_PX
from ddpo.starter.stages import Recipe, WorkFolder
from ddpo.starter.text import article_prompt

SHEET_COLUMNS = 9


def export(work: WorkFolder, recipe: Recipe, destination: Path) -> None:
    """Writes the averaged weights of the latest checkpoints as a pipeline, in place of the old one.

    Autoencoder and noise predictor are stored in float16, which halves the folder, and load as
    float32.

    Args:
        work: a training run that has come at least to the first checkpoint of the last stage.
        recipe: of the run; stored beside the weights.
        destination: folder of the pipeline.

    Raises:
        FileNotFoundError: the run has not come that far.
    """
    if not work.unet.exists():
        raise FileNotFoundError(
            f"{work.unet} does not exist: train on (with --resume) until the unet stage has saved "
            "its first checkpoint, then export"
        )
    vae, denoiser = build_vae(), Denoiser()
    load_ema(vae, work.vae)
    statistics = load_file(work.latents)
    whiten(vae, statistics["mean"], statistics["std"])
    step = load_ema(denoiser, work.unet)
    pipeline = assemble(vae, denoiser)

    fresh = destination.with_name(destination.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    # Not the text encoder: transformers would load it as float16, diffusers loads float32.
    vae.half()
    denoiser.unet.half()
    pipeline.save_pretrained(fresh, safe_serialization=True)
    for weights in fresh.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors lets only the owner read, also once installed
    write_json(
        fresh / "training.json",
        {"recipe": recipe.as_json(), "unet_pictures_seen": step * recipe.unet.batch},
    )
    old = destination.with_name(destination.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.replace(old)
    fresh.replace(destination)
    shutil.rmtree(old, ignore_errors=True)
    console.log(f"exported unet step {step} to {destination}")


def draw_sheet(pipeline_path: Path, sheet: Path, seed: int = 0) -> None:
    """Draws every animal once (guidance 3, 20 DDIM steps, eta 1) into one picture.

    Args:
        pipeline_path: folder of the pipeline.
        sheet: PNG to write: 9 columns in the order of `ANIMALS`.
        seed: of the first animal; the next has the next.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_path)
    pipeline.set_progress_bar_config(disable=True)
    images, _ = pipeline(
        [article_prompt(animal) for animal in ANIMALS],
        return_dict=False,
        num_inference_steps=20,
        guidance_scale=3.0,
        eta=1.0,
        generator=[torch.Generator().manual_seed(seed + place) for place in range(len(ANIMALS))],
    )
    rows = -(-len(images) // SHEET_COLUMNS)
    canvas = Image.new("RGB", (SHEET_COLUMNS * SIZE_PX, rows * SIZE_PX))
    for place, image in enumerate(images):
        row, column = divmod(place, SHEET_COLUMNS)
        canvas.paste(image, (column * SIZE_PX, row * SIZE_PX))
    canvas.save(sheet, optimize=True)
    console.log(f"drew {len(images)} animals into {sheet}")
