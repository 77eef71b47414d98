"""What each shipped prompt set promises."""

import json

import pytest

from ddpo.errors import ConfigError
from ddpo.prompts import ACTIVITIES, ANIMALS, IMAGENET_ANIMALS, available_prompt_sets, load_prompts


def texts(name, **parameters):
    return [prompt.text for prompt in load_prompts(name, parameters)]


def test_simple_animals_are_the_published_45_in_order():
    assert len(ANIMALS) == len(set(ANIMALS)) == 45
    assert (ANIMALS[0], ANIMALS[20], ANIMALS[-1]) == ("cat", "ant", "kangaroo")
    assert texts("simple_animals", article=False) == list(ANIMALS)


def test_articles_are_the_default_and_follow_the_sound():
    animals = texts("simple_animals")
    assert {"a cat", "an ant", "a bee", "a hedgehog"} <= set(animals)
    assert not {"a ant", "an bee", "ant"} & set(animals)
    imagenet = texts("imagenet_animals")
    assert {"an African elephant", "a European gallinule", "an ox", "a sea urchin"} <= set(imagenet)


def test_imagenet_animals_are_the_first_398_classes_by_first_synonym():
    assert len(IMAGENET_ANIMALS) == len(set(IMAGENET_ANIMALS)) == 398
    # Class indices as everybody's ImageNet class table has them.
    at = {0: "tench", 1: "goldfish", 207: "golden retriever", 291: "lion", 327: "starfish"}
    assert {index: IMAGENET_ANIMALS[index] for index in at} == at
    assert IMAGENET_ANIMALS[397] == "puffer"
    assert not any("," in name or name != name.strip() for name in IMAGENET_ANIMALS)
    assert texts("imagenet_animals", article=False) == list(IMAGENET_ANIMALS)


def test_animal_activities_pair_every_animal_with_every_activity():
    prompts = texts("animal_activities")
    assert ACTIVITIES == ("washing the dishes", "riding a bike", "playing chess")
    assert len(prompts) == len(set(prompts)) == 45 * 3
    assert prompts[0] == "a cat washing the dishes"
    assert "an ant riding a bike" in prompts


def test_counting_asks_the_published_questions():
    two_cats = load_prompts("counting", {})[0]
    assert two_cats.text == "two cats"
    assert two_cats.metadata == {
        "questions": [
            "How many cats are there in this image?",
            "What animal is in this image?",
        ],
        "answers": ["two", "cat"],
    }


def test_counting_covers_every_number_of_every_animal():
    prompts = texts("counting")
    assert len(prompts) == len(set(prompts)) == 7 * 45
    assert {text.split()[0] for text in prompts} == {
        "two", "three", "four", "five", "six", "seven", "eight",
    }  # fmt: skip
    assert len(load_prompts("counting", {"low": 3, "high": 3})) == 45


def test_colored_discs_describe_what_their_text_says():
    prompts = load_prompts("colored_discs", {})
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 4 * 4
    chosen = {"colors": ["blue"], "places": ["right", "top"]}
    assert [(p.text, p.metadata) for p in load_prompts("colored_discs", chosen)] == [
        (text, {"disc": {"color": [48, 48, 208], "center": center, "radius": 0.25}})
        for text, center in (
            ("a blue disc on the right", [0.75, 0.5]),
            ("a blue disc at the top", [0.5, 0.25]),
        )
    ]
    with pytest.raises(ConfigError, match="empty; it needs at least one"):
        load_prompts("colored_discs", {"colors": []})
    with pytest.raises(ConfigError, match="purple"):
        load_prompts("colored_discs", {"colors": ["purple"]})


@pytest.mark.parametrize(
    "plural",
    [
        "sheep",
        "deer",
        "fish",
        "mice",
        "geese",
        "wolves",
        "foxes",
        "butterflies",
        "flies",
        "monkeys",
    ],
)
def test_counting_knows_irregular_plurals(plural):
    assert f"five {plural}" in texts("counting")


def test_one_animal_is_not_plural():
    one = load_prompts("counting", {"low": 1, "high": 1})
    assert one[0].text == "one cat"
    assert one[0].metadata["questions"][0] == "How many cats are there in this image?"


def test_text_file_gives_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  ein Bär, groß \n# not a comment".encode())
    assert texts("text_file", path=str(path)) == ["a cat", "ein Bär, groß", "# not a comment"]


def test_jsonl_file_carries_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"text": "two cats", "metadata": {"answers": ["two"]}}, {"text": "a dog"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts("text_file", {"path": str(path)})
    assert [p.text for p in prompts] == ["two cats", "a dog"]
    assert [p.metadata for p in prompts] == [{"answers": ["two"]}, {}]


@pytest.mark.parametrize(
    "line",
    ['{"txt": "a"}', '{"text": 3}', "a cat", '{"text": " "}', '{"text": "a", "text": "b"}'],
)
def test_bad_jsonl_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ConfigError, match=r"prompts\.jsonl, line 2"):
        load_prompts("text_file", {"path": str(path)})


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.txt .*No such file"):
        load_prompts("text_file", {"path": str(tmp_path / "gone.txt")})


def test_empty_sets_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="empty; it needs at least one"):
        load_prompts("text_file", {"path": str(tmp_path / "empty.txt")})
    with pytest.raises(ConfigError, match="empty; it needs at least one"):
        load_prompts("prompt_list", {"prompts": []})


def test_prompt_list_keeps_order_and_repeats():
    assert texts("prompt_list", prompts=["b", "a", "b"]) == ["b", "a", "b"]


@pytest.mark.parametrize("name", available_prompt_sets())
def test_every_set_has_a_name_that_loads_or_says_what_it_needs(name):
    try:
        assert load_prompts(name, {})
    except ConfigError as error:
        assert name in {"text_file", "prompt_list"}  # no defaults are possible
        assert "needs" in str(error)


def test_what_the_papers_sets_leave_out_is_in_none_of_them():
    animals, seen = texts("unseen_animals"), set(texts("simple_animals", article=False))
    assert 250 < len(animals) < 398
    assert not [name for name in animals if seen.intersection(name.split())]
    assert len(set(texts("everyday_objects"))) == 30
    activities = texts("unseen_activities")
    assert len(set(activities)) == 45 * 5 and activities[0] == "a cat reading a book"
    assert not set(activities) & set(texts("animal_activities"))
