"""Prompt sets of one's own, prompts themselves, and drawing."""

import collections
import pickle

import pytest
import torch

from ddpo.errors import ConfigError
from ddpo.prompts import Prompt, draw_prompt, load_prompts, prompt_set_digest

OWN = """
from ddpo.prompts import Prompt

def birds(count: int, colour: str = "red"):
    for index in range(count):
        yield f"{colour} bird {index}"

def mixed():
    return ["a plane", Prompt("a train", {"wheels": 8})]

def numbers():
    return [1, 2]

def one_string():
    return "a cat"

def broken():
    return {}["key"]

def exits():
    raise SystemExit("usage: prompts FILE")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_prompts_fixture.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_prompts_fixture"


def test_own_function_gives_strings_or_prompts(own):
    birds = load_prompts(f"{own}:birds", {"count": 2})
    assert birds == (Prompt("red bird 0"), Prompt("red bird 1"))
    assert load_prompts(f"{own}:mixed", {}) == (Prompt("a plane"), Prompt("a train", {"wheels": 8}))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("numbers", "not 1"),
        ("one_string", "return a list"),
        ("broken", "failed: KeyError: 'key'"),
        ("bird", "did you mean 'birds'"),
        ("OWN", "no 'OWN'"),
    ],
)
def test_own_function_that_gives_no_prompts_is_refused_by_name(own, function, message):
    with pytest.raises(ConfigError, match=f"own_prompts_fixture:{function}.*{message}"):
        load_prompts(f"{own}:{function}", {})


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("simple_animal", {}, "did you mean 'simple_animals'.*counting"),
        ("counting", {"hihg": 3}, "'hihg'; did you mean 'high'"),
        ("counting", {"high": "3"}, "'high' is '3'.*integer"),
        ("counting", {"high": True}, "'high' is True.*integer"),
        ("counting", {"low": 0}, "'low' is 0.*greater than or equal to 1"),
        ("counting", {"low": 5, "high": 4}, "above high"),
        ("prompt_list", {}, "needs 'prompts'"),
        ("prompt_list", {"prompts": ["a", 3]}, r"\[1\] Input should be a valid string"),
        ("prompt_list", {"prompts": "a cat"}, "valid (list|array)"),
        ("animal_activities", {"article": True}, "It takes none"),
    ],
)
def test_wrong_names_and_parameters_are_refused_with_the_way_out(name, parameters, message):
    with pytest.raises(ConfigError, match=message):
        load_prompts(name, parameters)


def test_prompts_compare_by_text_and_metadata():
    assert Prompt("a", {"k": [1]}) == Prompt("a", {"k": [1]})
    assert Prompt("a", {"k": [1]}) != Prompt("a", {"k": [2]})
    assert len({Prompt("a", {"k": [1]}), Prompt("a", {"k": [1]}), Prompt("b")}) == 2
    assert pickle.loads(pickle.dumps(Prompt("a", {"k": 1}))) == Prompt("a", {"k": 1})


def test_prompt_keeps_its_own_copy_of_metadata():
    metadata = {"k": [1]}
    prompt = Prompt("a", metadata)
    metadata["k"].append(2)
    assert prompt.metadata == {"k": [1]}


@pytest.mark.parametrize(
    "metadata", [{"k": float("nan")}, {"k": object()}, {1: "k"}, {"k": {1, 2}}]
)
def test_metadata_that_json_cannot_say_is_refused(metadata):
    with pytest.raises(ConfigError, match="prompt 'a' must be plain JSON"):
        Prompt("a", metadata)


@pytest.mark.parametrize("text", ["", " \n", None, 3])
def test_prompt_without_words_is_refused(text):
    with pytest.raises(ConfigError, match="text that is not blank"):
        Prompt(text)


def test_draws_are_uniform():
    prompts = load_prompts("prompt_list", {"prompts": ["a", "b", "c", "d"]})
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    counts = collections.Counter(draw_prompt(prompts, generator).text for _ in range(draws))
    chi2 = sum((counts[p.text] - draws / 4) ** 2 / (draws / 4) for p in prompts)
    assert chi2 < 16.3  # 99.9th percentile at 3 degrees of freedom


def test_draws_repeat_from_the_same_seed_and_differ_between_seeds():
    prompts = load_prompts("imagenet_animals", {"article": False})

    def draws(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw_prompt(prompts, generator).text for _ in range(8)]

    assert draws(7) == draws(7) != draws(8)


def test_digest_follows_contents_and_order():
    a, b = Prompt("a"), Prompt("b")
    digests = {
        prompt_set_digest([a, b]),
        prompt_set_digest([b, a]),
        prompt_set_digest([a]),
        prompt_set_digest([Prompt("a", {"k": 1}), b]),
    }
    assert len(digests) == 4
    assert prompt_set_digest((Prompt("a"), Prompt("b"))) in digests


def test_a_function_that_exits_is_an_error(own):
    with pytest.raises(ConfigError, match=r"exits' failed: SystemExit: usage: prompts FILE"):
        load_prompts(f"{own}:exits", {})


def test_a_prompt_is_a_text_and_what_is_known_about_it():
    prompt = Prompt("Two cats", {"n": 2})
    assert isinstance(prompt, str) and prompt.lower() == "two cats" and f"{prompt}" == "Two cats"
    assert type(prompt.text) is str and prompt == prompt.text == "Two cats"
    assert prompt != Prompt("Two cats") and prompt == Prompt("Two cats", {"n": 2})
    assert len({prompt, "Two cats"}) == 1
    again = pickle.loads(pickle.dumps(prompt))
    assert again == prompt and again.metadata == {"n": 2}
    with pytest.raises(AttributeError):
        prompt.text = "Three cats"
