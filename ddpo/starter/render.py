"""Training pictures: an animal's glyph somewhere on a background, 64x64 RGB.

Backgrounds differ widely in how well they compress as JPEG, so that a reward on the file's size
finds something to select from. Picture `i` of a seed depends on nothing but the seed and `i`.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from ddpo.starter.glyphs import ANIMALS, glyph

SIZE_PX = 64
Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating]

PATTERN_CONTRAST = 0.6
"""Softens stripes and checks, so that they do not hide the animal in front of them."""


@dataclass(frozen=True)
class Picture:
    """A rendered picture.

    Attributes:
        pixels: uint8 [64, 64, 3].
        animal: index into `ANIMALS`.
        background: a key of `BACKGROUNDS`.
    """

    pixels: Pixels
    animal: int
    background: str


def _colours(rng: Generator, count: int) -> Floats:
    """Draws `count` RGB colours, float32 [count, 3] in 0..255."""
    return rng.integers(0, 256, (count, 3)).astype(np.float32)


def _blend(amount: Floats, rng: Generator, contrast: float = 1.0) -> Floats:
    """Mixes two random colours by `amount` [64, 64] in 0..1 into float32 [64, 64, 3]."""
    first, second = _colours(rng, 2)
    return first + contrast * amount[..., None] * (second - first)


def _across(rng: Generator, angle: float) -> Floats:
    """Distance in pixels along `angle`, from a random origin: float32 [64, 64]."""
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX].astype(np.float32)
    return x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, SIZE_PX)


def _plain(rng: Generator) -> Floats:
    return np.broadcast_to(_colours(rng, 1), (SIZE_PX, SIZE_PX, 3))


def _gradient(rng: Generator) -> Floats:
    along = _across(rng, rng.uniform(0, 2 * np.pi))
    return _blend((along - along.min()) / np.ptp(along), rng)


def _stripes(rng: Generator) -> Floats:
    band_px = rng.integers(4, 12)
    along = _across(rng, rng.integers(4) * np.pi / 4)
    return _blend((along // band_px % 2).astype(np.float32), rng, PATTERN_CONTRAST)


def _checks(rng: Generator) -> Floats:
    cell_px = rng.integers(4, 14)
    columns, rows = _across(rng, 0.0) // cell_px, _across(rng, np.pi / 2) // cell_px
    return _blend(((columns + rows) % 2).astype(np.float32), rng, PATTERN_CONTRAST)


def _noise(rng: Generator) -> Floats:
    # Grains of 1, 2 or 4 pixels: coarse ones survive the autoencoder, fine ones as texture.
    grain_px = 2 ** int(rng.integers(3))
    side = SIZE_PX // grain_px
    grains = rng.standard_normal((side, side, 3), dtype=np.float32) * rng.uniform(8, 36)
    return _colours(rng, 1) + grains.repeat(grain_px, 0).repeat(grain_px, 1)


BACKGROUNDS: dict[str, Callable[[Generator], Floats]] = {
    "plain": _plain,
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "noise": _noise,
}

FREQUENCIES = (0.3, 0.25, 0.15, 0.15, 0.15)
"""How often each of `BACKGROUNDS` is drawn: the busy ones cost the model most, so less often."""


def draw(seed: int, index: int, background: str | None = None) -> Picture:
    """Draws picture `index` of a seed.

    Args:
        seed: names an endless sequence of pictures.
        index: position in it; animals take turns, so that each is equally frequent.
        background: a key of `BACKGROUNDS`, or None to draw one at random.

    Returns:
        The picture; the same arguments give the same bytes.
    """
    rng = np.random.default_rng((seed, index))
    animal = index % len(ANIMALS)
    kind = str(rng.choice(list(BACKGROUNDS), p=FREQUENCIES))
    background = background or kind
    canvas = Image.fromarray(BACKGROUNDS[background](rng).clip(0, 255).astype(np.uint8))

    image = glyph(ANIMALS[animal])
    scale = rng.uniform(0.55, 0.95) * SIZE_PX / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    corner = (
        int(rng.integers(SIZE_PX - width + 1)),
        int(rng.integers(SIZE_PX - height + 1)),
    )
    canvas.paste(image, corner, image)
    return Picture(np.asarray(canvas), animal, background)


def _draw_range(seed: int, bounds: tuple[int, int]) -> Pixels:
    return np.stack([draw(seed, index).pixels for index in range(*bounds)])


def draw_many(seed: int, count: int, workers: int, chunk: int = 512) -> Pixels:
    """Draws the first `count` pictures of a seed in `workers` processes.

    Returns:
        uint8 [count, 64, 64, 3]; picture `i` shows animal `i % 45`.
    """
    bounds = [(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    if workers == 1 or len(bounds) == 1:
        return np.concatenate([_draw_range(seed, bound) for bound in bounds])
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(partial(_draw_range, seed), bounds)))
