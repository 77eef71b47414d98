"""How close an image is to the disc that its prompt describes, pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores

BACKGROUND = 128.0
"""Of what lies outside the disc, in all three channels. Grey: near white or black, images saturate,
and small changes of them then change no reward."""


class Disc(BaseModel):
    """A disc, as the metadata ``disc`` of a prompt describes it; lengths in sides of the image."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    color: tuple[int, int, int] = Field(strict=False)
    """Red, green and blue, 0..255."""
    center: tuple[float, float] = Field(strict=False)
    """From the left and from the top; 0..1 is inside the image."""
    radius: float = Field(gt=0.0)

    def covers(self, width: int, height: int) -> NDArray[np.bool_]:
        """Return which pixels have their center in the disc, [H, W]."""
        x = (np.arange(width) + 0.5) / width - self.center[0]
        y = (np.arange(height) + 0.5) / height - self.center[1]
        return x**2 + y[:, None] ** 2 <= self.radius**2


class DiscMatch:
    """Reward = minus the mean of an image's distances to a disc and to its grey surroundings.

    A distance is the mean absolute difference over pixels and channels, in 0..1. Both count as much
    however small the disc is, so the reward is 0 for the disc itself, and at least -1.
    """

    version: ClassVar[str] = "1"
    thread_safe: ClassVar[bool] = True
    needs: ClassVar[str] = "prompts with a disc (`colored_discs`)"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images; a prompt without a disc inside the image fails."""
        distances = [_distances(i, p) for i, p in zip(images, prompts, strict=True)]
        inside, outside = (np.array([pair[k] for pair in distances]) for k in (0, 1))
        return Scores(
            -(inside + outside) / 2,
            np.isnan(inside) | np.isnan(outside),
            {"disc_distance": inside.tolist(), "background_distance": outside.tolist()},
        )


def _distances(image: Image.Image, prompt: Prompt) -> tuple[float, float]:
    """Return the mean distances inside and outside of the disc; nan where there is none."""
    try:
        disc = Disc.model_validate(prompt.metadata.get("disc"))
    except ValidationError:
        return math.nan, math.nan
    pixels = np.asarray(image.convert("RGB"), np.float64)
    covered = disc.covers(image.width, image.height)
    if covered.all() or not covered.any():
        return math.nan, math.nan
    inside = np.abs(pixels[covered] - disc.color).mean() / 255
    outside = np.abs(pixels[~covered] - BACKGROUND).mean() / 255
    return float(inside), float(outside)
