"""What a service accepts, and how it rejects the rest."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import HTTPException

from ddpo.basics.images import PIXEL_LIMIT

_MIB = 1024**2


@dataclass(frozen=True)
class Limits:
    """Bounds of what a service accepts."""

    images: int = 64
    """Images in one request."""
    image_bytes: int = 16 * _MIB
    """Bytes of one encoded image."""
    image_pixels: int = PIXEL_LIMIT
    """Pixels of one image."""
    batch_pixels: int = 64 * _MIB
    """Pixels of all images in one request."""
    prompts_bytes: int = 4 * _MIB
    """Bytes of a request's prompts, including their metadata."""
    body_bytes: int = 64 * _MIB
    """Bytes of a request."""
    body_seconds: float = 60.0
    """Seconds in which a request must arrive."""
    held_bytes: int = 1024 * _MIB
    """Bytes of all requests that are being read, waiting or being scored."""
    workers: int = 1
    """Requests that are scored at the same time."""
    queue: int = 64
    """Requests that wait for a worker."""


def refusal(status: int, detail: str, *, retry_after_s: int | None = None) -> HTTPException:
    """Return the exception that rejects a request.

    Args:
        status: The HTTP status.
        detail: The reason, for people.
        retry_after_s: Seconds after which the client may retry; None if retrying is pointless.
    """
    encodable = detail.encode("utf-8", "replace").decode()  # a reward's message may have surrogates
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return HTTPException(status, encodable, headers)
