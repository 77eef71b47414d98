"""JPEG (in)compressibility: how many bytes an image takes (arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores

QUALITY = 95
BYTES_PER_KB = 1000


def jpeg_kb(image: Image.Image) -> float:
    """Return the size of an image as a JPEG of quality 95, in kB of 1000 bytes.

    Pillow's encoder with default settings otherwise, as in the published code. The image is
    converted to RGB (alpha is dropped); its metadata (comments, profiles) does not count.
    """
    pixels = Image.fromarray(np.asarray(image.convert("RGB")))
    buffer = io.BytesIO()
    pixels.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / BYTES_PER_KB


class JpegIncompressibility:
    """Reward = size as a JPEG of quality 95, in kB; column ``jpeg_kb`` is the same.

    A 512 px image of Stable Diffusion takes about 100 kB.
    """

    version: ClassVar[str] = "1"
    thread_safe: ClassVar[bool] = True

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images; prompts are ignored."""
        sizes = [jpeg_kb(image) for image in images]
        return Scores(np.array(sizes, np.float32), columns={"jpeg_kb": sizes})


class JpegCompressibility:
    """Reward = minus the size as a JPEG of quality 95, in kB; column ``jpeg_kb`` is the size."""

    version: ClassVar[str] = "1"
    thread_safe: ClassVar[bool] = True

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images; prompts are ignored."""
        sizes = [jpeg_kb(image) for image in images]
        return Scores(-np.array(sizes, np.float32), columns={"jpeg_kb": sizes})
