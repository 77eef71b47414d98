"""Whether an answer in free words is the expected one.

An answer is right where it contains the expected one as whole words, in a row. Case does not count,
nor does punctuation. '3' and 'three' are one word, up to ninety-nine; 'a cat' does not say 'one'.
The expected answer may stand in its plural: a picture of three cats is of the animal 'cat'.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpo.errors import RewardError
from ddpo.prompts.base import Prompt

if TYPE_CHECKING:
    import inflect

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_NUMBERS = {word: number for number, word in enumerate(_SMALL.split())}
_TENS = {
    word: 10 * number
    for number, word in enumerate(
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2
    )
}


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        text: As it is asked.
        expected: What a right answer contains.
    """

    text: str
    expected: str


def questions_of(prompt: Prompt) -> tuple[Question, ...]:
    """Return the questions of a prompt: its metadata ``questions`` and ``answers``.

    Raises:
        RewardError: It has none, or not one answer for each.
    """
    questions, answers = prompt.metadata.get("questions"), prompt.metadata.get("answers")
    if not questions and not answers:
        raise RewardError(
            "the prompt has no questions; give it `questions` and `answers` in its metadata, as "
            "the prompt set `counting` does"
        )
    asked, expected = _texts("questions", questions), _texts("answers", answers)
    if len(asked) != len(expected):
        raise RewardError(f"the prompt has {len(asked)} questions and {len(expected)} answers")
    return tuple(map(Question, asked, expected))


def is_right(answer: str, expected: str) -> bool:
    """Return whether an answer contains what is expected, as this module's head says."""
    said = _words(answer)
    return any(
        said[start : start + len(form)] == form
        for form in _forms(expected)
        for start in range(len(said) - len(form) + 1)
    )


def share_of_right(questions: Sequence[Question], answers: Sequence[str]) -> tuple[float, str]:
    """Compare the answers to a picture's questions with the expected ones.

    Args:
        questions: Q of them, at least 1.
        answers: Q answers.

    Returns:
        The share of right ones in 0..1, and all of it as JSON text: a list of objects with
        ``question``, ``answer``, ``expected`` and ``right``.
    """
    found = [
        {
            "question": question.text,
            "answer": answer,
            "expected": question.expected,
            "right": is_right(answer, question.expected),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    share = sum(bool(each["right"]) for each in found) / len(found)
    return share, json.dumps(found, ensure_ascii=False)


def _texts(name: str, given: object) -> list[str]:
    """Return a list of the metadata as texts; an answer may be written as a number."""
    found = [
        str(each) if isinstance(each, str | int) and not isinstance(each, bool) else ""
        for each in (given if isinstance(given, list) else [None])
    ]
    if not all(_WORD.search(each) for each in found):
        raise RewardError(
            f"`{name}` in the prompt's metadata must be a list of texts with words in them, not "
            f"{given!r}"
        )
    return found


@functools.lru_cache(maxsize=4096)
def _forms(expected: str) -> tuple[list[str], ...]:
    as_given = _words(expected)
    if as_given and as_given[-1].isalpha():
        return as_given, _words(_english().plural_noun(expected.strip()))
    return (as_given,)  # a number has no plural


def _words(text: str) -> list[str]:
    """Return the words of a text, numbers as digits."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words: list[str] = []
    tens = 0  # of the word before, where it may go on: twenty-
    for word in _WORD.findall(plain):
        unit = _NUMBERS.get(word)
        if tens and unit is not None and 1 <= unit <= 9:
            words[-1] = str(tens + unit)
        elif unit is not None:
            words.append(str(unit))
        elif word in _TENS:
            words.append(str(_TENS[word]))
        else:
            words.append(_digits(word))
        tens = _TENS.get(word, 0)
    return words


def _digits(word: str) -> str:
    plain = word.replace(",", "") if _THOUSANDS.fullmatch(word) else word
    return str(int(plain)) if plain.isdecimal() else plain


@functools.cache
def _english() -> inflect.engine:
    import inflect  # here, since importing it takes about a second

    return inflect.engine()
