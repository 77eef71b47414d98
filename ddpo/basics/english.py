"""Articles, plurals and numbers in words, as inflect knows them.

`english.json` has what inflect says of every noun of the shipped prompt sets and of the starter
model, and of small numbers: importing inflect takes seconds, since typeguard instruments it.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import inflect


def with_article(noun: str) -> str:
    """Return a noun with its indefinite article: ``"a cat"``, ``"an ant"``."""
    return _known("article").get(noun) or str(_inflect().a(noun))


def plural(noun: str) -> str:
    """Return the plural of a noun: ``"cats"``, ``"mice"``."""
    return _known("plural").get(noun) or str(_inflect().plural_noun(noun))


def number_word(number: int) -> str:
    """Return a number in words: ``"two"`` for 2."""
    return _known("number").get(str(number)) or str(_inflect().number_to_words(str(number)))


@functools.cache
def _known(form: str) -> dict[str, str]:
    text = resources.files("ddpo.basics").joinpath("english.json").read_text(encoding="utf-8")
    return json.loads(text)[form]


@functools.cache
def _inflect() -> inflect.engine:
    import inflect

    return inflect.engine()
