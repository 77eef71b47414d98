r"""Rewards of your own, in any module that Python can import.

    export PYTHONPATH=examples
    ddpo score own_reward:sharpness photo.png --prompt "a cat"
    ddpo train configs/starter.yaml --set reward.name=own_reward:sharpness
    ddpo train configs/starter.yaml --set reward.name=own_reward:Near \
        --set 'reward.parameters={color: [0, 0, 255]}'

Higher is better. A run pins the source of its reward, and refuses to resume with another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ddpo.prompts import Prompt
from ddpo.rewards import Scores


def sharpness(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    """Reward contrast: the standard deviation of the gray values."""
    return [float(np.asarray(image.convert("L"), float).std()) for image in images]


class Near:
    """Reward images whose mean color is near a given one.

    Args:
        color: Red, green and blue, in 0..255.
    """

    def __init__(self, color: list[int]) -> None:
        self.color = np.array(color)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score images; extra columns are stored beside the reward."""
        means = [np.asarray(image.convert("RGB"), float).mean((0, 1)) for image in images]
        values = [-float(np.abs(mean - self.color).mean()) for mean in means]
        return Scores(np.array(values, np.float32), columns={"red": [float(m[0]) for m in means]})
