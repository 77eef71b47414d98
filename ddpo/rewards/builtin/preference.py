"""What people preferred, for images of preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores

PREFERRED = "preferred"
"""Metadata of a prompt: whether the image of it is the one that was chosen."""


class Preference:
    """Reward = 1 for the chosen image of a pair and 0 for the rejected one.

    For runs with `preferences`. Any other image has no such mark, and counts as failed; so judge
    the run's evaluations by another reward.
    """

    version: ClassVar[str] = "1"
    thread_safe: ClassVar[bool] = True
    needs: ClassVar[str] = "preference pairs (`preferences` in the config)"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images by the metadata ``preferred`` of their prompts."""
        marks = [prompt.metadata.get(PREFERRED) for prompt in prompts]
        failed = np.array([not isinstance(mark, bool) for mark in marks], bool)
        return Scores(np.array([mark is True for mark in marks], np.float32), failed)
