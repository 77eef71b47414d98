"""The report of a training run: loss curves, reconstructions and generated samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open

from ddpo.starter.scenes import Kind, scenes
from starter_training.loop import CHECKPOINT_EVERY, console
from starter_training.measure import fresh_pictures, reconstruct
from starter_training.trained import trained_vae
from starter_training.work import Recipe, WorkFolder

COLUMNS = 9
SHOWN = 2 * COLUMNS
"""Samples per kind of scene."""

GAP_PX = 2


def grid(images: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """Arrange images of equal size in a grid on white.

    Args:
        images: The images.
        columns: Images per row.
        scale: Integer magnification, without smoothing.
    """
    width, height = (length * scale for length in images[0].size)
    rows = -(-len(images) // columns)
    size = (columns * (width + GAP_PX) - GAP_PX, rows * (height + GAP_PX) - GAP_PX)
    canvas = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        large = image.resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(large, (column * (width + GAP_PX), row * (height + GAP_PX)))
    return canvas


def draw_curves(work: WorkFolder, recipe: Recipe, file: Path) -> None:
    """Plot the loss of the three trained models over the images seen.

    Args:
        work: A finished run.
        recipe: Its recipe.
        file: PNG to write.
    """
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    trained = (
        ("autoencoder", work.vae, recipe.vae),
        ("judge", work.judge, recipe.judge),
        ("generator", work.unet, recipe.unet),
    )
    for axes, (name, checkpoint, budget) in zip(figure.subplots(1, 3), trained, strict=True):
        with safe_open(checkpoint, framework="pt") as tensors:
            curve = tensors.get_tensor("curve")
        steps = ((torch.arange(len(curve)) + 1) * CHECKPOINT_EVERY).clamp(max=budget.steps)
        seen = steps * budget.batch
        axes.plot(seen.numpy() / 1000, curve.numpy())
        axes.set_yscale("log")
        axes.set_title(name)
        axes.set_xlabel("images seen, thousands")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=100)


def write_report(work: WorkFolder, recipe: Recipe, pipeline_folder: Path) -> None:
    """Write `report/` into the work folder: loss curves, reconstructions, samples.

    Args:
        work: A finished run.
        recipe: Its recipe.
        pipeline_folder: The exported pipeline.
    """
    folder = work.root / "report"
    folder.mkdir(exist_ok=True)
    draw_curves(work, recipe, folder / "curves.png")
    pixels = np.stack([picture.pixels for picture in fresh_pictures(recipe.seed, 4 * COLUMNS)])
    made = reconstruct(trained_vae(work), pixels)
    rows = []
    for start in range(0, len(pixels), COLUMNS):
        rows += [*pixels[start : start + COLUMNS], *made[start : start + COLUMNS]]
    grid([Image.fromarray(row) for row in rows], COLUMNS, 2).save(folder / "reconstructions.png")
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    for kind in Kind:
        places = np.linspace(0, len(scenes(kind)) - 1, SHOWN).round().astype(int)
        spread = [scenes(kind)[place] for place in places]
        images, _ = pipeline(
            [scene.prompt for scene in spread],
            return_dict=False,
            num_inference_steps=20,
            guidance_scale=3.0,
            eta=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(SHOWN)],
        )
        grid(images, COLUMNS, 2).save(folder / f"{kind}.png")
    console.log(f"wrote curves, reconstructions and samples to {folder}")
