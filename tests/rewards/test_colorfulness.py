"""Colourfulness against the published formula, by hand, on pictures of known colours."""

import math

import numpy as np
import pytest
from PIL import Image

from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.builtin.colorfulness import opponent_statistics

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)


def picture(*colours, side=8):
    """Return equal vertical bands of colours."""
    bands = [np.full((side, side, 3), colour, np.uint8) for colour in colours]
    return Image.fromarray(np.concatenate(bands, axis=1))


def score(*images):
    return score_images(load_reward("colorfulness", {}), images, [Prompt("a cat")] * len(images))


# rg and yb of red are 255 and 127.5; of green -255 and 127.5; of blue 0 and -255.
BY_HAND = [
    ([GREY], 0.0),
    ([RED], 0.3 * math.sqrt(255**2 + 127.5**2)),
    ([BLUE], 0.3 * 255),
    ([RED, GREEN], 255 + 0.3 * 127.5),
    ([RED, GREY], math.sqrt(127.5**2 + 63.75**2) + 0.3 * math.sqrt(127.5**2 + 63.75**2)),
    (
        [RED, GREEN, BLUE],
        # rg: mean 0, mean square 2/3 of 255²; yb: mean 0, mean square (2 * 127.5² + 255²) / 3.
        math.sqrt(2 * 255**2 / 3 + (2 * 127.5**2 + 255**2) / 3),
    ),
]


@pytest.mark.parametrize(("colours", "expected"), BY_HAND, ids=lambda value: str(value)[:40])
def test_bands_of_pure_colours_score_as_worked_out_by_hand(colours, expected):
    assert score(picture(*colours)).values[0] == pytest.approx(expected, rel=1e-6)


def test_a_noisy_picture_agrees_with_sums_over_its_pixels_in_float64():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    rg, yb = [], []
    for red, green, blue in pixels.reshape(-1, 3).tolist():
        rg.append(red - green)
        yb.append(0.5 * (red + green) - blue)
    count = len(rg)
    expected = {}
    for name, values in (("rg", rg), ("yb", yb)):
        mean = math.fsum(values) / count
        expected[f"{name}_mean"] = mean
        expected[f"{name}_std"] = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / count)
    image = Image.fromarray(pixels)
    assert opponent_statistics(image) == pytest.approx(expected, rel=1e-12)
    m3 = math.sqrt(expected["rg_std"] ** 2 + expected["yb_std"] ** 2) + 0.3 * math.sqrt(
        expected["rg_mean"] ** 2 + expected["yb_mean"] ** 2
    )
    scores = score(image)
    assert scores.values[0] == np.float32(m3)
    assert {name: column[0] for name, column in scores.columns.items()} == pytest.approx(expected)


def test_each_picture_is_scored_by_itself_in_any_mode():
    grey, bright = picture(GREY), picture(RED, GREEN)
    alone = [score(image).values[0] for image in (grey, bright)]
    together = score(grey, bright, bright.convert("RGBA"), bright.convert("L")).values
    assert together.tolist() == [*alone, alone[1], 0]
