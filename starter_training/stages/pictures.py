"""The first stage: the pictures to train on."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpo.basics.randomness import derive_seed
from ddpo.starter.render import Pixels, draw_many
from ddpo.starter.scenes import SCENE_NUMBERS, Scene
from starter_training.loop import console, replacing
from starter_training.work import Recipe, WorkFolder


def judge_seed(recipe: Recipe) -> int:
    """Returns the seed of the judge's own pictures."""
    return derive_seed(recipe.seed, "judge pictures")


def draw_pictures(work: WorkFolder, recipe: Recipe) -> None:
    """Draws the generator's pictures and, of another seed, the judge's, in two processes."""
    count = recipe.cached_pictures
    if not work.pictures.exists():
        console.log(f"drawing {count} pictures for the generator")
        _write(work.pictures, draw_many(recipe.seed, count, workers=2))
    if not work.judge_pictures.exists():
        console.log(f"drawing {count} pictures for the judge")
        pixels = draw_many(judge_seed(recipe), count, workers=2, all_pairs=True)
        _write(work.judge_pictures, pixels)


def _write(path: Path, pixels: Pixels) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, pixels, allow_pickle=False)


def read_pictures(path: Path) -> Pixels:
    """Opens drawn pictures without reading them whole."""
    return np.load(path, mmap_mode="c", allow_pickle=False)


def scene_numbers(seed: int, count: int, *, all_pairs: bool = False) -> Tensor:
    """Returns what the first `count` pictures of a seed show: places in `SCENES`, int64 [count]."""
    shown = (Scene.at(seed, index, all_pairs=all_pairs) for index in range(count))
    return torch.tensor([SCENE_NUMBERS[scene] for scene in shown])
