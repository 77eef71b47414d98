"""The reward for a drawn disc, against sums over its pixels in float64."""

import math

import numpy as np
import pytest
from PIL import Image

from ddpo.prompts import Prompt, load_prompts
from ddpo.rewards import load_reward, score_images

GREY = (128, 128, 128)
RED_LEFT = {"color": [208, 48, 48], "center": [0.25, 0.5], "radius": 0.25}


def score(images, prompts):
    return score_images(load_reward("disc_match", {}), images, prompts)


def in_disc(disc, x, y, width, height):
    across = (x + 0.5) / width - disc["center"][0]
    down = (y + 0.5) / height - disc["center"][1]
    return math.hypot(across, down) <= disc["radius"]


def drawn(disc, width=32, height=32):
    image = Image.new("RGB", (width, height), GREY)
    for x in range(width):
        for y in range(height):
            if in_disc(disc, x, y, width, height):
                image.putpixel((x, y), tuple(disc["color"]))
    return image


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_noise_scores_as_sums_over_its_pixels_in_float64(size):
    width, height = size
    disc = {"color": [10, 200, 90], "center": [0.7, 0.4], "radius": 0.22}
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    inside, outside = [], []
    for y, row in enumerate(pixels.tolist()):
        for x, pixel in enumerate(row):
            covered = in_disc(disc, x, y, width, height)
            wanted = disc["color"] if covered else GREY
            (inside if covered else outside).extend(
                abs(a - b) / 255 for a, b in zip(pixel, wanted, strict=True)
            )
    means = [math.fsum(part) / len(part) for part in (inside, outside)]
    scores = score([Image.fromarray(pixels)], [Prompt("a disc", {"disc": disc})])
    assert scores.values[0] == np.float32(-sum(means) / 2)
    assert scores.columns["disc_distance"] == pytest.approx(means[:1], rel=1e-12)
    assert scores.columns["background_distance"] == pytest.approx(means[1:], rel=1e-12)


def test_only_the_disc_that_the_prompt_describes_scores_0():
    prompts = load_prompts("colored_discs", {})
    images = [drawn(prompt.metadata["disc"]) for prompt in prompts]
    values = np.array([score(images, [prompt] * len(images)).values for prompt in prompts])
    assert (np.diag(values) == 0).all()
    assert (values[~np.eye(len(prompts), dtype=bool)] < -0.05).all()


def test_disc_and_background_count_alike():
    """Every channel of grey is 80 from red inside, and of red 80 from grey outside."""
    prompt = Prompt("a disc", {"disc": RED_LEFT})
    plain = [Image.new("RGB", (32, 32), color) for color in (GREY, (208, 48, 48), (0, 0, 0))]
    expected = [-40 / 255, -40 / 255, -((208 + 48 + 48) / 3 + 128) / 2 / 255]
    assert score(plain, [prompt] * 3).values.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"disc": None},
        {"disc": {**RED_LEFT, "color": [255, 0]}},
        {"disc": {**RED_LEFT, "color": "red"}},
        {"disc": {**RED_LEFT, "radius": 0.0}},
        {"disc": {**RED_LEFT, "radius": 9.0}},
        {"disc": {**RED_LEFT, "center": [3.0, 3.0]}},
        {"disc": {**RED_LEFT, "shape": "ring"}},
    ],
    ids=str,
)
def test_a_prompt_without_a_disc_in_the_image_fails_alone(metadata):
    prompts = [Prompt("a cat", metadata), Prompt("a disc", {"disc": RED_LEFT})]
    scores = score([drawn(RED_LEFT)] * 2, prompts)
    assert scores.failed.tolist() == [True, False]
    assert math.isnan(scores.values[0]) and scores.values[1] == 0
