"""Images as PNG bytes, checked before they are decoded."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddpo.errors import UnreadableData

PIXEL_LIMIT = 4096 * 4096
"""A small file can claim any size, and decoding allocates what it claims."""

DECODING_ERRORS = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,  # among others of text, compressed in a PNG, that is longer than Pillow allows
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for a file that it cannot read."""


def encode_image(image: Image.Image) -> bytes:
    """Encode an image as PNG, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(data: bytes) -> Image.Image:
    """Decode a PNG file of at most 4096x4096 pixels.

    Raises:
        UnreadableData: It has another format or more pixels, or is damaged.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.width * image.height > PIXEL_LIMIT:
            raise UnreadableData(
                "an image", f"it claims {image.width}x{image.height}, more than 4096x4096 pixels"
            )
        image.load()
    except DECODING_ERRORS as error:
        raise UnreadableData("an image", str(error)) from error
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image in 8-bit RGB.

    16-bit gray keeps its upper 8 bits, as Pillow reads 16-bit colour; Pillow itself would clip it.

    Raises:
        ValueError: Its pixels are 32-bit numbers, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        gray = np.asarray(image.convert("I"), np.int32) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ValueError("its pixels are 32-bit numbers; save it with 8 or 16 bits per channel")
    return image.convert("RGB")
