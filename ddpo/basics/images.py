"""Images as PNG bytes, checked before they are decoded."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from ddpo.errors import UnreadableData

PIXEL_LIMIT = 4096 * 4096
"""A small file can claim any size, and decoding allocates what it claims."""


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
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableData("an image", str(error)) from error
    return image
