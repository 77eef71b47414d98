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
    BACKGROUND_FREQUENCIES,
    BACKGROUNDS,
    SIZE_PX,
    draw,
    draw_many,
    draw_scene,
)
from ddpo.starter.scenes import KIND_FREQUENCIES, SCENES, Kind, Scene, scenes, trained_scenes


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


def test_no_prompt_of_the_animal_tasks_names_another_word() -> None:
    """In no form: of the 398 animals of ImageNet some are kinds of them, such as 'black swan'."""
    sets = ("simple_animals", "animal_activities", "counting")
    words = {word for name in sets for p in load_prompts(name, {}) for word in p.text.split()}
    assert not words & {form for name in OTHERS for form in (name, f"{name}s")}


@pytest.mark.parametrize(
    ("name", "activity", "count"),
    [("dgo", None, 1), ("cat", "playing chess", 2), ("cat", None, 5), ("cat", "flying", 1),
     ("apple", None, 2), ("owl", "playing chess", 1)],
)  # fmt: skip
def test_what_cannot_be_drawn_is_no_scene(name: str, activity: str | None, count: int) -> None:
    with pytest.raises(ValueError, match="expected one of ANIMALS"):
        Scene(name, activity, count)


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
    for kind, share in KIND_FREQUENCIES.items():
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
    for name, frequency in zip(BACKGROUNDS, BACKGROUND_FREQUENCIES, strict=True):
        share = np.mean([picture.background == name for picture in pictures])
        assert share == pytest.approx(frequency, abs=0.08)
    assert pictures[0].pixels.shape == (SIZE_PX, SIZE_PX, 3)


def spans(pixels: np.ndarray) -> tuple[int, int]:
    """Height and width of what is not the corner's colour."""
    there = np.abs(pixels.astype(int) - pixels[0, 0]).sum(-1) > 60
    rows, columns = np.nonzero(there)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def cropped(pixels: np.ndarray) -> np.ndarray:
    """What is not the corner's colour, as bool in its own box."""
    there = np.abs(pixels.astype(int) - pixels[0, 0]).sum(-1) > 60
    rows, columns = np.nonzero(there)
    return there[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_a_single_is_drawn_at_three_sizes_at_many_places_and_both_ways_round() -> None:
    pictures = [drawn(Scene("snake"), number) for number in range(60)]
    # Up to three pixels of an edge are too faint to be seen here.
    lengths = {max(spans(picture)) for picture in pictures}
    assert {
        min((44, 52, 60), key=lambda side: side - length if side >= length else 99)
        for length in lengths
    } == {44, 52, 60}
    assert all(any(0 <= side - length <= 3 for side in (44, 52, 60)) for length in lengths)
    shapes = {cropped(p).shape: cropped(p) for p in pictures}
    mirrored = [
        any((cropped(p) == shapes[cropped(p).shape][:, ::-1]).mean() > 0.97 for p in pictures)
        for shape in shapes
    ]
    assert any(mirrored)
    places = {tuple(np.argwhere(p.astype(int).sum(-1) < 300)[0]) for p in pictures}
    assert len(places) > 10


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


@pytest.mark.parametrize("doing", ACTIVITIES)
def test_an_activity_shows_the_animal_and_the_same_thing_beside_it(doing: str) -> None:
    one, other = (drawn(Scene(name, doing), 3).astype(int) for name in ("ant", "spider"))
    background = one[0, 0]
    same = (one == other).all(-1)
    thing = same & (np.abs(one - background).sum(-1) > 60)
    assert thing.sum() > 100, "nothing that both animals share is drawn"
    assert (~same).sum() > 100, "both animals look alike"


def test_backgrounds_differ_in_jpeg_size() -> None:
    sizes = {
        name: np.mean([jpeg_bytes(drawn(scene, 0, name)) for scene in scenes(Kind.SINGLE)])
        for name in BACKGROUNDS
    }
    assert sizes["plain"] < sizes["stripes"] < sizes["checks"], sizes
    assert sizes["mosaic"] > 1.25 * sizes["plain"], sizes
