"""The JPEG rewards against files that Pillow wrote."""

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images

RNG = np.random.default_rng(0)
FLAT = Image.new("RGB", (64, 64), (200, 30, 30))
NOISE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
RAMP = Image.fromarray(np.stack([np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))] * 3, axis=-1))
IMAGES = [FLAT, NOISE, RAMP]
PROMPTS = [Prompt("a cat")] * 3


def sizes_on_disk_kb(tmp_path, images):
    sizes = []
    for index, image in enumerate(images):
        path = tmp_path / f"{index}.jpg"
        image.save(path, quality=95)
        sizes.append(path.stat().st_size / 1000)
    return sizes


def test_incompressibility_is_the_size_of_the_file_in_kb(tmp_path):
    scores = score_images(load_reward("jpeg_incompressibility", {}), IMAGES, PROMPTS)
    expected = sizes_on_disk_kb(tmp_path, IMAGES)
    assert scores.values.dtype == np.float32
    np.testing.assert_array_equal(scores.values, np.float32(expected))
    assert scores.columns == {"jpeg_kb": expected}
    assert expected[1] > 2 * expected[0]  # the pictures do tell sizes apart


def test_compressibility_is_minus_the_size_and_its_column_is_the_size(tmp_path):
    scores = score_images(load_reward("jpeg_compressibility", {}), IMAGES, PROMPTS)
    expected = sizes_on_disk_kb(tmp_path, IMAGES)
    np.testing.assert_array_equal(scores.values, -np.float32(expected))
    assert scores.columns == {"jpeg_kb": expected}
    assert not scores.failed.any()


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_pictures_of_other_modes_are_made_rgb(tmp_path, mode):
    image = RAMP.convert(mode)
    scores = score_images(load_reward("jpeg_incompressibility", {}), [image], PROMPTS[:1])
    assert scores.columns["jpeg_kb"] == sizes_on_disk_kb(tmp_path, [image.convert("RGB")])


def test_only_pixels_count(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 5000)
    NOISE.save(tmp_path / "commented.png", pnginfo=info)
    commented = Image.open(tmp_path / "commented.png")
    assert commented.info["comment"]
    scores = score_images(
        load_reward("jpeg_incompressibility", {}), [commented, NOISE], PROMPTS[:2]
    )
    assert scores.values[0] == scores.values[1]
