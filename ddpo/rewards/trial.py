"""Try a custom reward on two images before a run starts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextvars import copy_context

import numpy as np
from PIL import Image
from pydantic import JsonValue

from ddpo.basics.children import ordinary_children
from ddpo.errors import RewardError, UnusableScores
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Reward
from ddpo.rewards.identity import RewardIdentity
from ddpo.rewards.scoring import score_samples

PATIENCE_S = 10.0
"""Seconds to wait for the answer. A slower reward is used without this check."""
_SIZE_PX = 512
_COUNT = 2

_logger = logging.getLogger(__name__)
_tried: set[str] = set()
"""Digests of the rewards that this process has tried."""


def try_out(reward: Reward, prompts: Sequence[Prompt], size: tuple[int, int] | None = None) -> None:
    """Check that a custom reward returns scores, by trying it on two images of noise.

    An error that it raises is only a warning, since it may not support noise. The rewards that come
    with the project, and weighted sums of them, are not tried.

    Args:
        reward: The reward.
        prompts: The prompt set.
        size: Width and height of the images, in pixels.

    Raises:
        UnusableScores: It returns something else.
    """
    identity = reward.identity
    if identity.digest in _tried or not _is_own(identity):
        return
    errors: list[RewardError] = []

    def ask() -> None:
        try:
            with ordinary_children():  # a reward may have a pool
                score_samples(reward, _noise(size), asked, tries=1)
        except RewardError as error:
            errors.append(error)

    asked = [prompts[index % len(prompts)] for index in range(_COUNT)]
    thread = threading.Thread(target=copy_context().run, args=(ask,), name="trial", daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    for error in errors:
        if isinstance(error, UnusableScores):
            raise UnusableScores(f"{error} (tried on two images of noise before the run starts)")
        _logger.warning("tried on two images of noise before the run starts: %s", error)
    _tried.add(identity.digest)


def _is_own(identity: RewardIdentity) -> bool:
    """Return whether a reward, or a component of a sum, is named by its import path."""
    components = identity.parameters if identity.name == "weighted" else {}
    return any(":" in name for name in (identity.name, *_names(dict(components))))


def _names(identity: JsonValue) -> Iterator[str]:
    """Yield the names in the identity of a sum, which has those of its components."""
    parts: Iterable[JsonValue] = identity if isinstance(identity, list) else ()
    if isinstance(identity, dict):
        name = identity.get("name")
        if isinstance(name, str):
            yield name
        parts = identity.values()
    for part in parts:
        yield from _names(part)


def _noise(size: tuple[int, int] | None) -> list[Image.Image]:
    width, height = size or (_SIZE_PX, _SIZE_PX)
    pixels = np.random.default_rng(0).integers(0, 256, (_COUNT, height, width, 3), np.uint8)
    return [Image.fromarray(image) for image in pixels]
