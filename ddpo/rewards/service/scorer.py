"""The reward behind a service: its queue, and scoring a batch of encoded images."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

from fastapi import Request
from PIL import Image, UnidentifiedImageError
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from ddpo.basics.images import as_rgb
from ddpo.errors import RewardError
from ddpo.rewards.base import Reward, Scores
from ddpo.rewards.identity import RewardIdentity
from ddpo.rewards.scoring import score_images
from ddpo.rewards.service.form import Batch
from ddpo.rewards.service.limits import Limits, refusal

_FORMATS = ("PNG", "JPEG")

_logger = logging.getLogger(__name__)


class Scorer:
    """The reward and its queue, both bounded.

    Args:
        load: Builds the reward; called once, in the thread that scores.
        limits: How many requests are scored and queued, and how many bytes they may take.
    """

    def __init__(self, load: Callable[[], Reward], limits: Limits) -> None:
        self._load = load
        self._limits = limits
        self._admitted = 0
        self._held_bytes = 0
        self._executor: ThreadPoolExecutor
        self._loading: Future[Reward]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Load the reward, and accept batches until the block ends."""
        self._executor = ThreadPoolExecutor(self._limits.workers, thread_name_prefix="reward")
        self._loading = self._executor.submit(self._load)
        try:
            yield
        finally:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def reward(self) -> Reward:
        """Return the reward; until it is loaded, requests are rejected with a time to retry."""
        if not self._loading.done():
            raise refusal(503, "the reward is being loaded", retry_after_s=1)
        error = self._loading.exception()
        if error is not None:
            raise refusal(503, f"the reward could not be loaded: {error}")
        return self._loading.result()

    @contextmanager
    def slot(self) -> Iterator[Callable[[int], None]]:
        """Occupy a place in the queue; the yielded callable counts the bytes held there."""
        if self._admitted >= self._limits.workers + self._limits.queue:
            raise refusal(503, f"{self._admitted} requests are waiting already", retry_after_s=1)
        self._admitted += 1
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            if self._held_bytes + count > self._limits.held_bytes:
                raise refusal(503, "waiting requests have filled the memory", retry_after_s=1)
            held += count
            self._held_bytes += count

        try:
            yield hold
        finally:
            self._admitted -= 1
            self._held_bytes -= held

    async def score(self, batch: Batch, request: Request) -> bytes:
        """Score a batch when its turn comes, unless its client has disconnected by then."""
        job = self._executor.submit(_score, self.reward(), batch, self._limits)
        scored = asyncio.wrap_future(job)
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            await asyncio.wait({scored, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not scored.done() and job.cancel():
                raise ClientDisconnect
            return await scored
        finally:
            gone.cancel()


def _score(reward: Reward, batch: Batch, limits: Limits) -> bytes:
    """Decode and score a batch; return the body of the response. Runs in a thread."""
    images = _decode(batch.images, limits)
    try:
        scores = score_images(reward, images, batch.prompts)
        return _answer(scores, reward.identity)
    except RewardError as error:
        _logger.warning("%s", error, exc_info=True)
        raise refusal(500, str(error)) from error


def _decode(files: Sequence[bytes | bytearray], limits: Limits) -> list[Image.Image]:
    """Decode images, after checking that the sizes in all their headers are within the limits."""
    images: list[Image.Image] = []
    pixels = 0
    for index, data in enumerate(files):
        with _readable(index):
            images.append(Image.open(io.BytesIO(data), formats=_FORMATS))
        width, height = images[-1].size
        if width * height > limits.image_pixels:
            raise refusal(
                413,
                f"image {index} is {width}x{height}, more than {limits.image_pixels} pixels",
            )
        pixels += width * height
    if pixels > limits.batch_pixels:
        raise refusal(
            413,
            f"the images have {pixels} pixels in total, more than {limits.batch_pixels}; send "
            "fewer at once",
        )
    for index, image in enumerate(images):
        with _readable(index):
            image.load()
            if image.mode.startswith("I"):  # 16-bit gray, which rewards would clip
                images[index] = as_rgb(image)
    return images


@contextmanager
def _readable(index: int) -> Iterator[None]:
    """Turn whatever a decoder raises on damaged bytes into a rejection that names the image."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise refusal(413, f"image {index} has far too many pixels: {error}") from error
    except UnidentifiedImageError as error:  # its message is an address in memory
        raise refusal(422, f"image {index} is neither PNG nor JPEG") from error
    except Exception as error:
        raise refusal(422, f"cannot decode image {index}: {error}") from error


def _answer(scores: Scores, identity: RewardIdentity) -> bytes:
    """Encode scores as JSON. float32 is written in full precision, so it survives the trip."""
    message = {
        "values": [None if math.isnan(value) else value for value in scores.values.tolist()],
        "failed": scores.failed.tolist(),
        "columns": dict(scores.columns),
        "identity": {**asdict(identity), "digest": identity.digest},
    }
    return json.dumps(message, allow_nan=False).encode()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
