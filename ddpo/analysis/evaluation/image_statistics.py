"""Statistics of images that reveal common ways of exploiting a reward.

A reward that is exploited often favors a look that no prompt asks for: dark or overexposed images,
flat ones, noise, the same image for every seed. None of the statistics needs a network.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STATISTICS = ("brightness", "dark", "blown", "edges", "entropy", "jpeg_kb")
"""Names of an image's statistics."""

_DARK, _BLOWN = 0.1, 0.98  # of the largest luma
_EDGE = 0.05  # change of luma per pixel
_LEVELS = 8  # per channel
_THUMBNAIL_PX = 32
_ALIKE = 0.02


def image_statistics(image: Image.Image) -> dict[str, float]:
    """Measure one image.

    Args:
        image: RGB.

    Returns:
        ``brightness``: mean luma (ITU-R BT.601), in 0..1. ``dark``, ``blown``: shares of the
        pixels, in 0..1, whose luma is below 10% or above 98%. ``edges``: the share whose luma
        changes by more than 5% per pixel.
        ``entropy``: Shannon's entropy, in bits, of the colors in 8 levels per channel, in 0..9.
        ``jpeg_kb``: size in kB as a JPEG of quality 95.
    """
    rgb = image.convert("RGB")
    luma = np.asarray(rgb.convert("L"), dtype=np.float64) / 255
    down, right = np.gradient(luma)
    levels = np.asarray(rgb, dtype=np.int64) * _LEVELS // 256
    codes = (levels * (_LEVELS**2, _LEVELS, 1)).sum(axis=-1)
    shares = np.bincount(codes.ravel(), minlength=_LEVELS**3) / codes.size
    shares = shares[shares > 0]
    file = io.BytesIO()
    rgb.save(file, format="JPEG", quality=95)
    return {
        "brightness": float(luma.mean()),
        "dark": float((luma < _DARK).mean()),
        "blown": float((luma > _BLOWN).mean()),
        "edges": float((np.hypot(down, right) > _EDGE).mean()),
        "entropy": float(-(shares * np.log2(shares)).sum()),
        "jpeg_kb": len(file.getvalue()) / 1000,
    }


def thumbnail(image: Image.Image) -> NDArray[np.float64]:
    """Return an image's colors in coarse boxes: [32, 32, 3], in 0..1."""
    small = image.convert("RGB").resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def distances(thumbnails: Sequence[NDArray[np.float64]]) -> list[float]:
    """Return the root mean square difference of each pair of thumbnails, in 0..1."""
    return [
        float(np.sqrt(np.mean((one - other) ** 2)))
        for one, other in itertools.combinations(thumbnails, 2)
    ]


def diversity(groups: Sequence[Sequence[NDArray[np.float64]]]) -> dict[str, float]:
    """Measure how far the images of one prompt are from each other.

    Args:
        groups: The thumbnails of each prompt's images.

    Returns:
        ``diversity``, the mean distance of two images of one prompt, and ``repetition``, the share
        of such pairs that are alike (a distance below 0.02); empty if no prompt has two images.
    """
    found = [distance for group in groups for distance in distances(group)]
    if not found:
        return {}
    alike = sum(distance < _ALIKE for distance in found)
    return {"diversity": float(np.mean(found)), "repetition": alike / len(found)}
