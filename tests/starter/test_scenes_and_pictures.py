"""Promises of scenes and training pictures."""

import io
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ddpo.prompts import load_prompts
from ddpo.starter.glyphs import ACTIVITIES, ANIMALS, GLYPHS, OTHERS, glyph
from ddpo.starter.render import (
    BACKGROUNDS,
    FREQUENCIES,
    SIZE_PX,
    STEP_PX,
    draw,
    draw_many,
    draw_scene,
)
from ddpo.starter.scenes import FREQUENCIES as KINDS
from ddpo.starter.scenes import SCENES, Kind, Scene, scenes, trained_scenes


def jpeg_bytes(pixels: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.tell()


def drawn(scene: Scene, number: int, background: str = "plain") -> np.ndarray:
    return draw_scene(scene, np.random.default_rng(number), background).pixels


def test_every_name_has_a_glyph_of_its_own() -> None:
    assert (len(ANIMALS), len(ACTIVITIES), len(OTHERS)) == (45, 3, 24)
    assert len(GLYPHS) == 72
    small = {}
    for name in GLYPHS:
        image = glyph(name)
        assert 90 <= max(image.size) <= 136
        opaque = np.asarray(image)[..., 3] > 0
        assert opaque.mean() > 0.1, f"{name} is nearly empty"
        white = Image.new("RGB", image.size, "white")
        white.paste(image, (0, 0), image)
        small[name] = np.asarray(white.resize((32, 32))).astype(float)
    for one, other in combinations(GLYPHS, 2):
        assert np.abs(small[one] - small[other]).mean() > 8, f"{one} and {other} look alike"


def test_scenes_are_the_papers_prompts_and_more() -> None:
    prompts = {kind: [scene.prompt for scene in scenes(kind)] for kind in Kind}
    sets = (("simple_animals", {}), ("animal_activities", {}), ("counting", {"high": 4}))
    for kind, (name, parameters) in zip(Kind, sets, strict=False):
        assert sorted(prompts[kind]) == sorted(p.text for p in load_prompts(name, parameters))
    assert len({scene.prompt for scene in SCENES}) == len(SCENES) == 339


def test_no_training_prompt_names_another_word() -> None:
    words = [("simple_animals", {}), ("animal_activities", {}), ("counting", {})]
    words += [("imagenet_animals", {"article": False})]
    used = {prompt.text for name, parameters in words for prompt in load_prompts(name, parameters)}
    assert not used & {text for name in OTHERS for text in (name, Scene(name).prompt)}


def test_held_out_pairs_are_never_drawn_for_the_generator() -> None:
    held_out = [scene for scene in SCENES if scene.held_out]
    assert len(held_out) == 27
    assert Counter(scene.activity for scene in held_out) == dict.fromkeys(ACTIVITIES, 9)
    assert max(Counter(scene.name for scene in held_out).values()) == 1
    assert not any(scene.held_out for kind in Kind for scene in trained_scenes(kind))
    assert not any(Scene.at(0, index).held_out for index in range(3000))
    assert any(Scene.at(0, index, all_pairs=True).held_out for index in range(3000))


def test_each_kind_of_scene_is_drawn_as_often_as_it_should() -> None:
    kinds = Counter(Scene.at(1, index).kind for index in range(3000))
    for kind, share in KINDS.items():
        assert kinds[kind] / 3000 == pytest.approx(share, abs=0.03)


def test_a_picture_depends_on_seed_and_index_alone() -> None:
    one, again = draw(3, 17), draw(3, 17)
    assert one.scene == Scene.at(3, 17)
    assert one.pixels.tobytes() == again.pixels.tobytes()
    assert one.pixels.tobytes() != draw(4, 17).pixels.tobytes()
    assert draw_many(3, 18, workers=1)[17].tobytes() == one.pixels.tobytes()


@pytest.mark.slow
def test_two_processes_draw_what_one_draws() -> None:
    together, alone = draw_many(5, 6, workers=2, chunk=3), draw_many(5, 6, workers=1)
    assert together.tobytes() == alone.tobytes()


def test_all_backgrounds_occur() -> None:
    pictures = [draw(0, index) for index in range(450)]
    for name, frequency in zip(BACKGROUNDS, FREQUENCIES, strict=True):
        share = np.mean([picture.background == name for picture in pictures])
        assert share == pytest.approx(frequency, abs=0.08)
    assert pictures[0].pixels.shape == (SIZE_PX, SIZE_PX, 3)


def spans(pixels: np.ndarray) -> tuple[int, int]:
    """Height and width of what is not the corner's colour."""
    there = np.abs(pixels.astype(int) - pixels[0, 0]).sum(-1) > 60
    rows, columns = np.nonzero(there)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_a_single_is_drawn_at_three_sizes_and_both_ways_round() -> None:
    pictures = [drawn(Scene("spider"), number) for number in range(40)]
    sizes = {max(spans(picture)) // STEP_PX for picture in pictures}
    assert len(sizes) >= 3
    cats = {drawn(Scene("cat"), number).tobytes() for number in range(40)}
    assert len(cats) > 30
    snake = [drawn(Scene("snake"), number).astype(int) for number in range(40)]
    tails = {bool(p[-20:, :32].std() > p[-20:, 32:].std()) for p in snake}
    assert tails == {True, False}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_count_shows_that_many(count: int) -> None:
    """All glyphs of a scene are of one size, so their area tells their number."""
    pixels = drawn(Scene("gorilla", count=count), 1)
    there = (np.abs(pixels.astype(int) - pixels[0, 0]).sum(-1) > 120).astype(int)
    side = 32 if count == 2 else 28
    image = glyph("gorilla")
    scale = side / max(image.size)
    alpha = image.resize((round(image.width * scale), round(image.height * scale)))
    area = (np.asarray(alpha)[..., 3] > 128).sum()
    assert there.sum() / area == pytest.approx(count, abs=0.35)


def test_an_activity_adds_its_thing_to_the_animal() -> None:
    pictures = [drawn(Scene("cat", doing), 3) for doing in ACTIVITIES]
    for one, other in combinations(pictures, 2):
        assert np.abs(one.astype(int) - other).mean() > 5


def test_backgrounds_differ_in_jpeg_size() -> None:
    sizes = {
        name: np.mean([jpeg_bytes(drawn(scene, 0, name)) for scene in scenes(Kind.SINGLE)])
        for name in BACKGROUNDS
    }
    assert sizes["plain"] < sizes["stripes"] < sizes["checks"], sizes
    assert sizes["mosaic"] > 1.25 * sizes["plain"], sizes
