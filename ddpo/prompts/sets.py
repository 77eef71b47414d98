"""The prompt sets that come with the project.

Each is finite, and its prompts are sampled uniformly. Names and lists are those of Black et al.
2023 (arXiv 2305.13301) and of the code published with it.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ddpo.basics import trust
from ddpo.basics.english import number_word, plural, with_article
from ddpo.basics.paths import expand
from ddpo.errors import ConfigError
from ddpo.prompts.base import Prompt

_OTHER_FORMATS = {".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".xlsx"}
_BLANKS = " \t\r"


def _shipped_lines(file_name: str) -> tuple[str, ...]:
    text = resources.files("ddpo.prompts").joinpath(file_name).read_text(encoding="utf-8")
    return tuple(text.splitlines())


ANIMALS = _shipped_lines("simple_animals.txt")
"""The 45 common animals of the aesthetic and alignment tasks, without article."""

ACTIVITIES = _shipped_lines("activities.txt")
"""The 3 activities of the alignment task."""

IMAGENET_ANIMALS = _shipped_lines("imagenet_animals.txt")
"""First synonyms of the 398 animal classes of ILSVRC-2012 (indices 0 to 397), without article."""


OBJECTS = _shipped_lines("everyday_objects.txt")
"""30 inanimate objects, without article."""

UNSEEN_ACTIVITIES = _shipped_lines("unseen_activities.txt")
"""5 activities that are none of `ACTIVITIES`."""

_COLORS: dict[str, JsonValue] = {
    "red": [208, 48, 48],
    "green": [48, 208, 48],
    "blue": [48, 48, 208],
    "yellow": [208, 208, 48],
}
_CENTERS: dict[str, JsonValue] = {
    "left": [0.25, 0.5],
    "right": [0.75, 0.5],
    "top": [0.5, 0.25],
    "bottom": [0.5, 0.75],
}


def simple_animals(article: bool = True) -> list[Prompt]:
    """Return 45 common animals: the aesthetic task.

    Args:
        article: ``"a cat"``, as in the paper; otherwise ``"cat"``, as in its code.
    """
    return [Prompt(with_article(animal) if article else animal) for animal in ANIMALS]


def imagenet_animals(article: bool = True) -> list[Prompt]:
    """Return the 398 animals of ImageNet: the JPEG tasks.

    Args:
        article: ``"a sea urchin"``, as in the paper; otherwise ``"sea urchin"``, as in its code.
    """
    return [Prompt(with_article(animal) if article else animal) for animal in IMAGENET_ANIMALS]


def animal_activities() -> list[Prompt]:
    """Return 45 animals x 3 activities: the alignment task. ``"a cat washing the dishes"``."""
    return [
        Prompt(f"{with_article(animal)} {activity}")
        for animal in ANIMALS
        for activity in ACTIVITIES
    ]


def unseen_animals() -> list[Prompt]:
    """Return the animals of ImageNet whose names have none of the 45 common animals in them.

    With `everyday_objects` and `unseen_activities`, it tests whether training on the common animals
    carries over to other prompts (section 6.4 of the paper).
    """
    seen = set(ANIMALS)
    unseen = (animal for animal in IMAGENET_ANIMALS if seen.isdisjoint(animal.lower().split()))
    return [Prompt(with_article(animal)) for animal in unseen]


def everyday_objects() -> list[Prompt]:
    """Return 30 inanimate objects: ``"a teapot"``. See `unseen_animals`."""
    return [Prompt(with_article(thing)) for thing in OBJECTS]


def unseen_activities() -> list[Prompt]:
    """Return 45 animals x 5 other activities: ``"a cat reading a book"``. See `unseen_animals`."""
    return [
        Prompt(f"{with_article(animal)} {activity}")
        for animal in ANIMALS
        for activity in UNSEEN_ACTIVITIES
    ]


def counting(
    low: Annotated[int, Field(ge=1)] = 2, high: Annotated[int, Field(ge=1)] = 8
) -> list[Prompt]:
    """Return numbers x 45 animals, such as ``"two cats"``, with questions for VQA rewards.

    Metadata: ``questions`` ("How many cats are there in this image?", "What animal is in this
    image?") and their ``answers`` ("two", "cat"). The published code counts from 2 to 8, with 22
    of these animals.

    Args:
        low: Smallest number, at least 1.
        high: Largest number, inclusive.
    """
    if low > high:
        raise ConfigError(f"low is {low}, which is above high, {high}; swap them")
    return [_count(number, animal) for number in range(low, high + 1) for animal in ANIMALS]


def colored_discs(
    colors: list[Literal["red", "green", "blue", "yellow"]] | None = None,
    places: list[Literal["left", "right", "top", "bottom"]] | None = None,
) -> list[Prompt]:
    """Return colors x places, such as ``"a red disc on the left"``, for the reward `disc_match`.

    Metadata: ``disc``, its color in sRGB, and center and radius in sides of the image.

    Args:
        colors: By default all four.
        places: By default all four.
    """
    return [
        Prompt(
            f"a {color} disc {'at' if place in ('top', 'bottom') else 'on'} the {place}",
            {"disc": {"color": _COLORS[color], "center": _CENTERS[place], "radius": 0.25}},
        )
        for color in (colors if colors is not None else _COLORS)
        for place in (places if places is not None else _CENTERS)
    ]


def starter_scenes(
    kinds: list[Literal["single", "activity", "count", "other"]] | None = None,
    held_out: Literal["with", "without", "only"] = "with",
    every: Annotated[int, Field(ge=1)] = 1,
) -> list[Prompt]:
    """Return the prompts of all scenes that the starter model can generate.

    Args:
        kinds: ``single`` ("a cat", 45), ``activity`` ("a cat riding a bike", 135), ``count`` ("two
            cats" to four, 135), ``other`` ("an owl", 24); by default all.
        held_out: Whether to include the 27 activities on which the starter was not trained:
            ``with``, ``without``, or ``only`` these.
        every: Keep every n-th of the remaining prompts, starting with the first: fewer prompts are
            sampled more often, so that per-prompt statistics are usable sooner.
    """
    from ddpo.starter.scenes import SCENES

    chosen = [scene for scene in SCENES if kinds is None or scene.kind in kinds]
    if held_out != "with":
        chosen = [scene for scene in chosen if scene.held_out == (held_out == "only")]
    return [Prompt(scene.prompt) for scene in chosen[::every]]


def prompt_list(prompts: list[str]) -> list[Prompt]:
    """Return the given prompts.

    Args:
        prompts: Their texts. A duplicate is sampled twice as often.
    """
    return [Prompt(text) for text in prompts]


def text_file(path: str) -> list[Prompt]:
    """Return the prompts of a UTF-8 file, one per line; blank lines are skipped.

    Args:
        path: The file. Lines of a ``.jsonl`` or ``.ndjson`` are objects with ``text`` and
            optionally ``metadata``; those of any other file are the text itself. They end with LF
            or CRLF. A relative path starts at the working directory. A duplicate is sampled twice
            as often.
    """
    file = Path(expand(path))
    suffix = file.suffix.lower()
    trust.check_trusted(f"its prompts are the lines of a file on this machine, {file.absolute()}")
    if suffix in _OTHER_FORMATS:
        raise ConfigError(
            f"{file.absolute()} is a {suffix} file, whose lines are not prompts; write a text file "
            'with one prompt per line, or a .jsonl file with one {"text": "..."} per line'
        )
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read prompts from {file.absolute()} "
            f"({getattr(error, 'strerror', None) or error}); "
            "give the path of a UTF-8 text file with one prompt per line"
        ) from error
    numbered = [(n, line.strip(_BLANKS)) for n, line in enumerate(lines, start=1) if line.strip()]
    if suffix in {".jsonl", ".ndjson"}:
        return [_json_prompt(file, number, line) for number, line in numbered]
    return [Prompt(line) for _, line in numbered]


class _JsonPrompt(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    text: str
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


def _json_prompt(file: Path, number: int, line: str) -> Prompt:
    try:
        parsed = _JsonPrompt.model_validate(json.loads(line, object_pairs_hook=_unique))
        return Prompt(parsed.text, parsed.metadata)
    except (ValueError, ConfigError) as error:  # pydantic's errors are ValueErrors
        raise ConfigError(
            f'{file.absolute()}, line {number}: {error}; write {{"text": "...", "metadata": {{}}}}'
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; JSON would let the last of equal keys win."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise ConfigError(f"the key {twice[0]!r} occurs twice")
    return dict(pairs)


def _count(number: int, animal: str) -> Prompt:
    words = number_word(number)
    animals = plural(animal)
    return Prompt(
        f"{words} {animal if number == 1 else animals}",
        {
            "questions": [
                f"How many {animals} are there in this image?",
                "What animal is in this image?",
            ],
            "answers": [words, animal],
        },
    )
