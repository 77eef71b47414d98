"""JPEG (in)compressibility: how many bytes a picture takes (arXiv 2305.13301, section 5.1)."""

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
    """Return the size of a picture as a JPEG of quality 95, in kB of 1000 bytes.

    Pillow's encoder with its other settings left alone, as the published code has it. The picture
    is made RGB (alpha is dropped); what it carries beside its pixels (comments, profiles) does not
    count.
    """
    pixels = Image.fromarray(np.asarray(image.convert("RGB")))
    buffer = io.BytesIO()
    pixels.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / BYTES_PER_KB


class JpegIncompressibility:
    """Reward = size as a JPEG of quality 95, in kB; column ``jpeg_kb`` is the same.

    A 512 px picture of Stable Diffusion is some 100 kB.
    """

    version: ClassVar[str] = "1"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images; prompts play no part."""
        sizes = [jpeg_kb(image) for image in images]
        return Scores(np.array(sizes, np.float32), columns={"jpeg_kb": sizes})


class JpegCompressibility:
    """Reward = minus the size as a JPEG of quality 95, in kB; column ``jpeg_kb`` is the size."""

    version: ClassVar[str] = "1"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images; prompts play no part."""
        sizes = [jpeg_kb(image) for image in images]
        return Scores(-np.array(sizes, np.float32), columns={"jpeg_kb": sizes})
