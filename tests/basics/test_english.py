"""What is remembered of inflect is what inflect says."""

from __future__ import annotations

import inflect
import pytest

from ddpo.basics import english
from ddpo.prompts import ANIMALS, IMAGENET_ANIMALS
from ddpo.prompts.sets import OBJECTS
from ddpo.starter import glyphs

ENGLISH = inflect.engine()
STARTER = {*glyphs.ANIMALS, *glyphs.OTHERS}


@pytest.fixture
def by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take inflect away."""
    monkeypatch.setattr(english, "_inflect", None)


def test_shipped_nouns_need_no_inflect(by_heart: None) -> None:
    for noun in {*ANIMALS, *IMAGENET_ANIMALS, *OBJECTS, *STARTER}:
        assert english.with_article(noun) == ENGLISH.a(noun)
    for noun in {*ANIMALS, *glyphs.ANIMALS}:
        assert english.plural(noun) == ENGLISH.plural_noun(noun)
    for number in range(21):
        assert english.number_word(number) == ENGLISH.number_to_words(str(number))


def test_other_words_are_inflects() -> None:
    assert english.with_article("honest unicorn") == "an honest unicorn"
    assert english.plural("quetzalcoatlus") == ENGLISH.plural_noun("quetzalcoatlus")
    assert english.number_word(321) == "three hundred and twenty-one"
