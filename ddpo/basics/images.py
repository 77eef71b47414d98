"""Pictures as PNG bytes; what is read back is checked before it is decoded."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from ddpo.errors import UnreadableData

PIXEL_LIMIT = 4096 * 4096
"""A small file can claim any size; decoding allocates what it claims."""


def encode_image(image: Image.Image) -> bytes:
    """Encodes a picture without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(data: bytes) -> Image.Image:
    """Decodes a picture.

    Args:
        data: A PNG file of at most 4096x4096 pixels.

    Returns:
        The picture, decoded.

    Raises:
        UnreadableData: Another format, more pixels, or damaged bytes.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.width * image.height > PIXEL_LIMIT:
            raise UnreadableData(
                "a picture", f"it claims {image.width}x{image.height}, more than 4096x4096 pixels"
            )
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableData("a picture", str(error)) from error
    return image
