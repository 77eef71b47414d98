"""What a service takes in, and how it refuses the rest."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import HTTPException

from ddpo.basics.images import PIXEL_LIMIT

_MIB = 1024**2


@dataclass(frozen=True)
class Limits:
    """What a service takes in.

    Attributes:
        images: Pictures in one request.
        image_bytes: Bytes of one encoded picture.
        image_pixels: Pixels of one picture.
        batch_pixels: Pixels of all pictures of one request.
        prompts_bytes: Bytes of a request's prompts with their metadata.
        body_bytes: Bytes of a request.
        body_seconds: Seconds in which a request must have come in.
        held_bytes: Bytes of all requests that are read, waiting or being scored.
        workers: Requests that are scored at the same time.
        queue: Requests that wait for it.
    """

    images: int = 64
    image_bytes: int = 16 * _MIB
    image_pixels: int = PIXEL_LIMIT
    batch_pixels: int = 64 * _MIB
    prompts_bytes: int = 4 * _MIB
    body_bytes: int = 64 * _MIB
    body_seconds: float = 60.0
    held_bytes: int = 1024 * _MIB
    workers: int = 1
    queue: int = 64


def refusal(status: int, detail: str, *, retry_after_s: int | None = None) -> HTTPException:
    """Return what is raised to refuse a request.

    Args:
        status: The HTTP status.
        detail: Why, for people.
        retry_after_s: Seconds after which it may come again, if it may.
    """
    sayable = detail.encode("utf-8", "replace").decode()  # a reward's message may not be Unicode
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return HTTPException(status, sayable, headers)
