"""Training images: the glyphs of a scene on a background, 64x64 RGB.

Backgrounds differ widely in how well they compress as JPEG, so that a reward on the file size has
something to select from. Sizes and positions of glyphs are multiples of 4 pixels: a world small
enough to be learned on two CPU cores. Image `i` of a seed depends only on the seed and `i`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from ddpo.starter.glyphs import glyph
from ddpo.starter.scenes import Scene

SIZE_PX = 64
STEP_PX = 4
"""Longest sides, shifts, bands and tiles are multiples of this."""

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Picture:
    """A rendered image."""

    pixels: Pixels
    """uint8 [64, 64, 3]."""
    scene: Scene
    """What it shows."""
    background: str
    """A key of `BACKGROUNDS`."""


class Placed(NamedTuple):
    """A glyph in the frame: its longest side, and the centre of its box, all in pixels."""

    name: str
    side: int
    x: int
    y: int


def _tints(rng: Generator, count: int) -> Floats:
    """Sample `count` light RGB colors, float32 [count, 3] in 0..255; glyphs stand out on them."""
    return rng.integers(136, 256, (count, 3)).astype(np.float32)


def _blend(amount: Floats, rng: Generator) -> Floats:
    """Mix two random tints by `amount` [64, 64] in 0..1 into [64, 64, 3]."""
    first, second = _tints(rng, 2)
    return first + amount[..., None] * (second - first)


def _across(rng: Generator, angle: float) -> Floats:
    """Return the distance in pixels along `angle`, from a random multiple of 4: [64, 64]."""
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX].astype(np.float32)
    return x * np.cos(angle) + y * np.sin(angle) + STEP_PX * rng.integers(SIZE_PX // STEP_PX)


def _plain(rng: Generator) -> Floats:
    return np.broadcast_to(_tints(rng, 1), (SIZE_PX, SIZE_PX, 3))


def _gradient(rng: Generator) -> Floats:
    along = _across(rng, rng.uniform(0, 2 * np.pi))
    return _blend((along - along.min()) / np.ptp(along), rng)


def _stripes(rng: Generator) -> Floats:
    band_px = STEP_PX * rng.integers(1, 4)
    along = _across(rng, rng.integers(2) * np.pi / 2)
    return _blend((along // band_px % 2).astype(np.float32), rng)


def _checks(rng: Generator) -> Floats:
    cell_px = STEP_PX * rng.integers(1, 4)
    columns, rows = _across(rng, 0.0) // cell_px, _across(rng, np.pi / 2) // cell_px
    return _blend(((columns + rows) % 2).astype(np.float32), rng)


def _mosaic(rng: Generator) -> Floats:
    cells = SIZE_PX // STEP_PX
    shades = rng.standard_normal((cells, cells), dtype=np.float32).clip(-2, 2) * rng.uniform(8, 32)
    return _tints(rng, 1) + shades.repeat(STEP_PX, 0).repeat(STEP_PX, 1)[..., None]


BACKGROUNDS: dict[str, Callable[[Generator], Floats]] = {
    "plain": _plain,
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "mosaic": _mosaic,
}

BACKGROUND_FREQUENCIES = (0.3, 0.25, 0.15, 0.15, 0.15)
"""Probability of each of `BACKGROUNDS`; busy ones are rarer, since they cost the model most."""

_CELLS = {
    2: (((16, 32), (48, 32)), ((16, 20), (48, 44)), ((16, 44), (48, 20))),
    3: (((32, 16), (16, 48), (48, 48)), ((16, 16), (48, 16), (32, 48))),
    4: (((16, 16), (48, 16), (16, 48), (48, 48)),),
}
"""Centers of the glyphs of a count, in pixels: the arrangements to choose from."""


def _some(rng: Generator, low: int, high: int) -> int:
    """Sample a multiple of 4 from `low` to `high`, both included."""
    return int(rng.integers(low // STEP_PX, high // STEP_PX + 1)) * STEP_PX


def _arrange(scene: Scene, rng: Generator) -> list[Placed]:
    """Sample the positions of a scene's glyphs, from back to front."""
    if scene.count > 1:
        cells = _CELLS[scene.count]
        side = 32 if scene.count == 2 else 28
        return [Placed(scene.name, side, x, y) for x, y in cells[rng.integers(len(cells))]]
    if scene.activity is None:
        side = (44, 52, 60)[rng.integers(3)]
        slack = (SIZE_PX - side) // 2 // STEP_PX * STEP_PX
        x, y = (32 + _some(rng, -slack, slack) for _ in range(2))
        return [Placed(scene.name, side, x, y)]
    shift = _some(rng, -4, 4)
    actor, thing = {
        "riding a bike": ((40, 32, 22), (44, 32, 48)),
        "playing chess": ((40, 22, 28 + shift), (32, 50, 44)),
        "washing the dishes": ((40, 36, 22), (32, 20 + shift, 48)),
    }[scene.activity]
    return [Placed(scene.activity, *thing), Placed(scene.name, *actor)]


@cache
def _resized(name: str, side: int, mirrored: bool) -> Image.Image:
    image = glyph(name)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def draw_scene(scene: Scene, rng: Generator, background: str | None = None) -> Picture:
    """Render a scene.

    Args:
        scene: What to show.
        rng: Decides background, sizes, positions and whether the image is mirrored.
        background: A key of `BACKGROUNDS`; None for a random one.
    """
    kind = str(rng.choice(list(BACKGROUNDS), p=BACKGROUND_FREQUENCIES))
    background = background or kind
    canvas = Image.fromarray(BACKGROUNDS[background](rng).clip(0, 255).astype(np.uint8))
    mirrored = bool(rng.integers(2))
    for placed in _arrange(scene, rng):
        image = _resized(placed.name, placed.side, mirrored)
        x = SIZE_PX - placed.x if mirrored else placed.x
        corner = [
            min(max(centre - length // 2, 0), SIZE_PX - length)
            for centre, length in zip((x, placed.y), image.size, strict=True)
        ]
        canvas.paste(image, (corner[0], corner[1]), image)
    return Picture(np.asarray(canvas), scene, background)


def draw(seed: int, index: int, *, all_pairs: bool = False) -> Picture:
    """Render image `index` of a seed; equal arguments give equal bytes.

    Args:
        seed: Identifies an endless sequence of images.
        index: Position in the sequence.
        all_pairs: Whether held-out pairs of animal and activity are included.
    """
    scene = Scene.at(seed, index, all_pairs=all_pairs)
    return draw_scene(scene, np.random.default_rng((seed, index, 1)))


def _draw_range(seed: int, all_pairs: bool, bounds: tuple[int, int]) -> Pixels:
    return np.stack([draw(seed, index, all_pairs=all_pairs).pixels for index in range(*bounds)])


def draw_many(
    seed: int, count: int, workers: int, chunk: int = 512, *, all_pairs: bool = False
) -> Pixels:
    """Render the first `count` images of a seed in `workers` processes.

    Returns:
        uint8 [count, 64, 64, 3]; image `i` shows `Scene.at(seed, i, all_pairs=all_pairs)`.
    """
    bounds = [(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    draw_range = partial(_draw_range, seed, all_pairs)
    if workers == 1 or len(bounds) == 1:
        return np.concatenate([draw_range(bound) for bound in bounds])
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(draw_range, bounds)))
