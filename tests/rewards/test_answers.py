"""Which answers count as right."""

import json

import pytest

from ddpo.errors import RewardError
from ddpo.prompts import Prompt
from ddpo.prompts.sets import counting
from ddpo.rewards.models.answers import Question, is_right, questions_of, share_of_right


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("There are three cats in this image.", "three"),
        ("3", "three"),
        ("Three!", "3"),
        ("There are 03 of them", "three"),
        ("THE ANIMAL IS A CAT", "cat"),
        ("Cat.", "CAT"),
        ("a cat-like animal", "cat"),
        ("the cat's tail", "cat"),
        ("The animals are cats.", "cat"),
        ("two mice", "mouse"),
        ("a flock of geese", "goose"),
        ("wolves", "wolf"),
        ("a sea urchin", "sea urchin"),
        ("sea-urchins", "sea urchin"),
        ("twenty-one birds", "21"),
        ("twenty one birds", "21"),
        ("1,000 ants", "1000"),
        ("twenty cats and one dog", "one"),  # no word goes on with a number further back
        ("twenty, zero", "zero"),  # there is no twenty-zero
        ("ＣＡＴ", "cat"),  # full-width letters
    ],
)
def test_right_answers(answer, expected):
    assert is_right(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "cat"),
        ("a caterpillar", "cat"),
        ("scattered leaves", "cat"),
        ("There are 13 cats", "three"),
        ("thirteen", "three"),
        ("twenty-one birds", "one"),
        ("twenty-one birds", "twenty"),
        ("3.5 cats", "3"),
        ("1,000 ants", "1"),
        ("3,5 cats", "35"),  # a decimal comma, not thousands
        ("a cat", "one"),
        ("a dog", "cat"),
        ("an urchin of the sea", "sea urchin"),
        ("a cat", "cats"),
    ],
)
def test_wrong_answers(answer, expected):
    assert not is_right(answer, expected)


def test_the_share_is_that_of_the_right_answers_and_all_of_it_is_kept():
    questions = [Question("How many?", "two"), Question("What?", "cat"), Question("Where?", "sea")]
    share, text = share_of_right(questions, ["2", "Cats.", "on “land”"])
    assert share == 2 / 3
    assert json.loads(text) == [
        {"question": "How many?", "answer": "2", "expected": "two", "right": True},
        {"question": "What?", "answer": "Cats.", "expected": "cat", "right": True},
        {"question": "Where?", "answer": "on “land”", "expected": "sea", "right": False},
    ]


def test_every_prompt_of_the_counting_set_is_answered_right_by_itself():
    """Its own words are an answer to both of its questions, whatever the plural."""
    for prompt in counting():
        questions = questions_of(prompt)
        assert len(questions) == 2
        assert share_of_right(questions, [prompt.text, prompt.text])[0] == 1, prompt.text


def test_answers_may_be_numbers():
    prompt = Prompt("x", {"questions": ["How many?"], "answers": [3]})
    assert questions_of(prompt) == (Question("How many?", "3"),)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "has no questions; add `questions` and `answers`"),
        ({"questions": [], "answers": []}, "has no questions"),
        ({"questions": ["Who?", "Why?"], "answers": ["a cat"]}, "2 questions and 1 answers"),
        ({"questions": "Who?", "answers": ["a cat"]}, "`questions` .* must be a list of texts"),
        ({"questions": ["Who?"]}, "`answers` .* must be a list"),
        ({"questions": ["Who?"], "answers": [" ?"]}, "`answers` .* that contain words"),
        ({"questions": ["Who?"], "answers": [True]}, "`answers` .* list of texts"),
    ],
)
def test_metadata_that_asks_nothing_is_refused(metadata, message):
    with pytest.raises(RewardError, match=message):
        questions_of(Prompt("two cats", metadata))
