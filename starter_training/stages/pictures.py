"""The first stage: the images to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpo.basics.randomness import derive_seed
from ddpo.starter.render import Pixels, draw_many
from ddpo.starter.scenes import SCENE_NUMBERS, Scene
from starter_training.loop import console, replacing
from starter_training.work import FlowRecipe, Recipe, WorkFolder


def judge_seed(recipe: Recipe) -> int:
    """Return the seed of the judge's own images."""
    return derive_seed(recipe.seed, "judge pictures")


def draw_generator_pictures(work: WorkFolder, recipe: Recipe | FlowRecipe) -> None:
    """Render the generator's images, in two processes."""
    count = recipe.cached_pictures
    if not work.pictures.exists():
        console.log(f"rendering {count} images for the generator")
        _write(work.pictures, draw_many(recipe.seed, count, workers=2))


def draw_pictures(work: WorkFolder, recipe: Recipe) -> None:
    """Render the generator's images and, from another seed, the judge's, in two processes."""
    draw_generator_pictures(work, recipe)
    count = recipe.cached_pictures
    if not work.judge_pictures.exists():
        console.log(f"rendering {count} images for the judge")
        pixels = draw_many(judge_seed(recipe), count, workers=2, all_pairs=True)
        _write(work.judge_pictures, pixels)


def _write(path: Path, pixels: Pixels) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, pixels, allow_pickle=False)


def read_pictures(path: Path) -> Pixels:
    """Memory-map rendered images."""
    return np.load(path, mmap_mode="c", allow_pickle=False)


def scene_numbers(seed: int, count: int, *, all_pairs: bool = False) -> Tensor:
    """Return what the first `count` images of a seed show: indices into `SCENES`, int64."""
    shown = (Scene.at(seed, index, all_pairs=all_pairs) for index in range(count))
    return torch.tensor([SCENE_NUMBERS[scene] for scene in shown])
