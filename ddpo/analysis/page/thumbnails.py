"""Images for a page: small, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TypeVar

from ddpo.basics.images import decode_image

T = TypeVar("T")

_SIDE_PX = 256
_SMALL_PX = 128
"""Images up to this size are kept without loss, and shown with sharp pixels."""
_QUALITY = 80


def thumbnail_uri(png: bytes) -> str:
    """Return an image of at most 256x256 pixels as the data URI of a WebP.

    Args:
        png: The image.
    """
    image = decode_image(png).convert("RGB")
    small = max(image.size) <= _SMALL_PX
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    file = io.BytesIO()
    image.save(file, format="WEBP", lossless=small, quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def even(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items (2 or more) spread evenly, the first and the last included."""
    if len(items) <= count:
        return list(items)
    last = len(items) - 1
    return [items[round(last * number / (count - 1))] for number in range(count)]


def within(items: Sequence[T], limit: int, size: Callable[[T], int]) -> list[T]:
    """Return items spread evenly such that their sizes add up to a limit at most.

    The first and the last are always among them.

    Args:
        items: All items.
        limit: The limit.
        size: Returns an item's size.
    """
    chosen = list(items)
    while len(chosen) > 2 and sum(map(size, chosen)) > limit:
        chosen = even(chosen, max(2, len(chosen) * 3 // 4))
    return chosen
