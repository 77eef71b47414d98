"""Decide whether a free-form answer is the expected one.

An answer is right if it contains the expected one as consecutive whole words. Case and punctuation
are ignored. '3' and 'three' are the same word, up to ninety-nine; 'a cat' does not count as 'one'.
The expected answer may appear in its plural: an image of three cats shows the animal 'cat'.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ddpo.basics.english import plural
from ddpo.errors import RewardError
from ddpo.prompts.base import Prompt

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
    """A question about an image."""

    text: str
    """As it is asked."""
    expected: str
    """What a right answer contains."""


def questions_of(prompt: Prompt) -> tuple[Question, ...]:
    """Return a prompt's questions, from its metadata ``questions`` and ``answers``.

    Raises:
        RewardError: It has none, or their numbers differ.
    """
    questions, answers = prompt.metadata.get("questions"), prompt.metadata.get("answers")
    if not questions and not answers:
        raise RewardError(
            "the prompt has no questions; add `questions` and `answers` to its metadata, as the "
            "prompt set `counting` does"
        )
    texts, expected = _texts("questions", questions), _texts("answers", answers)
    if len(texts) != len(expected):
        raise RewardError(f"the prompt has {len(texts)} questions and {len(expected)} answers")
    return tuple(map(Question, texts, expected))


def is_right(answer: str, expected: str) -> bool:
    """Return whether an answer contains the expected one, as the module's docstring defines it."""
    words = _words(answer)
    return any(
        words[start : start + len(form)] == form
        for form in _forms(expected)
        for start in range(len(words) - len(form) + 1)
    )


def share_of_right(questions: Sequence[Question], answers: Sequence[str]) -> tuple[float, str]:
    """Compare the answers to an image's questions with the expected ones.

    Args:
        questions: At least one.
        answers: One per question.

    Returns:
        The share of right answers in 0..1, and the details as JSON text: a list of objects with
        ``question``, ``answer``, ``expected`` and ``right``.
    """
    details = [
        {
            "question": question.text,
            "answer": answer,
            "expected": question.expected,
            "right": is_right(answer, question.expected),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    share = sum(bool(detail["right"]) for detail in details) / len(details)
    return share, json.dumps(details, ensure_ascii=False)


def _texts(name: str, given: object) -> list[str]:
    """Return a list in the metadata as texts; an answer may be given as a number."""
    texts = [
        str(item) if isinstance(item, str | int) and not isinstance(item, bool) else ""
        for item in (given if isinstance(given, list) else [None])
    ]
    if not all(_WORD.search(text) for text in texts):
        raise RewardError(
            f"`{name}` in the prompt's metadata must be a list of texts that contain words, not "
            f"{given!r}"
        )
    return texts


@functools.lru_cache(maxsize=4096)
def _forms(expected: str) -> tuple[list[str], ...]:
    as_given = _words(expected)
    if as_given and as_given[-1].isalpha():
        return as_given, _words(plural(expected.strip()))
    return (as_given,)  # a number has no plural


def _words(text: str) -> list[str]:
    """Return the words of a text, with numbers as digits."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words: list[str] = []
    tens = 0  # of the previous word, if a unit may follow: twenty-
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
