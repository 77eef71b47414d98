"""Colorfulness: how far an image's colors are from grey, and from each other.

The metric M(3) of Hasler and Süsstrunk, "Measuring colourfulness in natural images" (Human Vision
and Electronic Imaging VIII, 2003, section 4): the cheaper of their two, on plain sRGB values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores

MEAN_WEIGHT = 0.3
"""Weight of the mean relative to the spread, as the authors fitted it to people's ratings."""


def opponent_statistics(image: Image.Image) -> dict[str, float]:
    """Return mean and standard deviation of an image's two opponent color channels.

    Args:
        image: Any mode; converted to RGB (alpha is dropped).

    Returns:
        ``rg_mean`` and ``rg_std`` of red minus green, ``yb_mean`` and ``yb_std`` of yellow (the
        mean of red and green) minus blue, over all pixels, on the scale of 0..255 sRGB, computed in
        float64.
    """
    pixels = np.asarray(image.convert("RGB"), np.float64)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    rg = red - green
    yb = (red + green) / 2 - blue
    return {
        "rg_mean": float(rg.mean()),
        "rg_std": float(rg.std()),
        "yb_mean": float(yb.mean()),
        "yb_std": float(yb.std()),
    }


class Colorfulness:
    """Reward = colorfulness M(3): 0 is grey, 109 "extremely colourful" to the paper's viewers."""

    version: ClassVar[str] = "1"
    thread_safe: ClassVar[bool] = True

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images; prompts are ignored."""
        statistics = [opponent_statistics(image) for image in images]
        values = [
            math.hypot(of_image["rg_std"], of_image["yb_std"])
            + MEAN_WEIGHT * math.hypot(of_image["rg_mean"], of_image["yb_mean"])
            for of_image in statistics
        ]
        names = ("rg_mean", "rg_std", "yb_mean", "yb_std")
        columns = {name: [of_image[name] for of_image in statistics] for name in names}
        return Scores(np.array(values, np.float32), columns=columns)
