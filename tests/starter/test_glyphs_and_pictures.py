"""Promises of the training pictures."""

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ddpo.starter.glyphs import ANIMALS, glyph
from ddpo.starter.render import BACKGROUNDS, FREQUENCIES, draw, draw_many


def jpeg_bytes(pixels: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.tell()


def test_the_papers_45_animals_each_have_a_glyph_of_their_own() -> None:
    assert len(ANIMALS) == len(set(ANIMALS)) == 45
    small = {}
    for animal in ANIMALS:
        image = glyph(animal)
        assert 90 <= max(image.size) <= 136
        opaque = np.asarray(image)[..., 3] > 0
        assert opaque.mean() > 0.2, f"{animal} is nearly empty"
        white = Image.new("RGB", image.size, "white")
        white.paste(image, (0, 0), image)
        small[animal] = np.asarray(white.resize((32, 32))).astype(float)
    for one, other in combinations(ANIMALS, 2):
        assert np.abs(small[one] - small[other]).mean() > 8, f"{one} and {other} look alike"


def test_a_picture_depends_on_seed_and_index_alone() -> None:
    one, again = draw(3, 17), draw(3, 17)
    assert one.pixels.tobytes() == again.pixels.tobytes()
    assert one.pixels.tobytes() != draw(4, 17).pixels.tobytes()
    assert one.pixels.tobytes() != draw(3, 17 + len(ANIMALS)).pixels.tobytes()
    assert draw_many(3, 18, workers=1)[17].tobytes() == one.pixels.tobytes()


def test_two_processes_draw_what_one_draws() -> None:
    together, alone = draw_many(5, 6, workers=2, chunk=3), draw_many(5, 6, workers=1)
    assert together.tobytes() == alone.tobytes()


def test_animals_take_turns_and_all_backgrounds_occur() -> None:
    pictures = [draw(0, index) for index in range(450)]
    assert [picture.animal for picture in pictures[:46]] == [*range(45), 0]
    for name, frequency in zip(BACKGROUNDS, FREQUENCIES, strict=True):
        share = np.mean([picture.background == name for picture in pictures])
        assert share == pytest.approx(frequency, abs=0.08)
    assert pictures[0].pixels.shape == (64, 64, 3)


def test_glyphs_lie_inside_the_frame_at_many_sizes_and_both_ways_round() -> None:
    spans, mirrored = [], set()
    for turn in range(40):
        pixels = draw(1, turn * len(ANIMALS), "plain").pixels.astype(int)
        drawn = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
        if not drawn[0].any() and not drawn[:, 0].any():
            rows, columns = np.nonzero(drawn)
            spans.append(max(np.ptp(rows), np.ptp(columns)) + 1)
            head = drawn[rows.min() : rows.min() + np.ptp(rows) // 3]
            mirrored.add(bool(np.nonzero(head)[1].mean() < (columns.min() + columns.max()) / 2))
    assert min(spans) < 42 and max(spans) > 52
    assert mirrored == {True, False}


def test_backgrounds_differ_in_jpeg_size() -> None:
    sizes = {
        name: np.mean([jpeg_bytes(draw(2, index, name).pixels) for index in range(90)])
        for name in BACKGROUNDS
    }
    assert sizes["plain"] < sizes["gradient"] < sizes["stripes"] < sizes["noise"], sizes
    assert sizes["noise"] > 1.4 * sizes["plain"], sizes
    assert sizes["checks"] > 1.3 * sizes["plain"], sizes
