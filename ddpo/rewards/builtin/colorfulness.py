"""Colourfulness: how far a picture's colours are from grey, and from each other.

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
"""Weight of the mean's part beside the spread's, as the authors fitted it to what people said."""


def opponent_statistics(image: Image.Image) -> dict[str, float]:
    """Return mean and standard deviation of a picture's two opponent colours.

    Args:
        image: Any mode; made RGB (alpha is dropped).

    Returns:
        ``rg_mean``, ``rg_std`` of red minus green, and ``yb_mean``, ``yb_std`` of yellow (half of
        red plus green) minus blue, over all pixels, in units of 0..255 sRGB, computed in float64.
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
    """Reward = colourfulness M(3): 0 is grey, 109 "extremely colourful" to the paper's viewers."""

    version: ClassVar[str] = "1"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images; prompts play no part."""
        found = [opponent_statistics(image) for image in images]
        values = [
            math.hypot(each["rg_std"], each["yb_std"])
            + MEAN_WEIGHT * math.hypot(each["rg_mean"], each["yb_mean"])
            for each in found
        ]
        names = ("rg_mean", "rg_std", "yb_mean", "yb_std")
        columns = {name: [each[name] for each in found] for name in names}
        return Scores(np.array(values, np.float32), columns=columns)
