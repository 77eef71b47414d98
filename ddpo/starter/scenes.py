"""What a training image shows, and the prompt that describes it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np

from ddpo.basics.english import number_word, plural, with_article
from ddpo.starter.glyphs import ACTIVITIES, ANIMALS, OTHERS


class Kind(StrEnum):
    """The four kinds of scene."""

    SINGLE = "single"
    ACTIVITY = "activity"
    COUNT = "count"
    OTHER = "other"


COUNTS = (2, 3, 4)

KIND_FREQUENCIES = {Kind.SINGLE: 0.36, Kind.ACTIVITY: 0.32, Kind.COUNT: 0.22, Kind.OTHER: 0.1}
"""Probability of each kind."""


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Raises:
        ValueError: The scene cannot be rendered, such as two animals with an activity.
    """

    name: str
    """One of `ANIMALS` or `OTHERS`."""
    activity: str | None = None
    """One of `ACTIVITIES`, or None."""
    count: int = 1
    """Number of animals, 1 to 4."""

    def __post_init__(self) -> None:
        alone = self.activity is None and self.count == 1
        several = self.activity is None and self.count in COUNTS
        doing = self.activity in ACTIVITIES and self.count == 1
        animal = self.name in ANIMALS and (alone or several or doing)
        if not animal and not (self.name in OTHERS and alone):
            raise ValueError(
                f"{self.name!r}, {self.activity!r}, {self.count}: expected one of ANIMALS, alone, "
                "with one of ACTIVITIES or in a number of 2 to 4; or one of OTHERS"
            )

    @property
    def kind(self) -> Kind:
        """The kind of scene."""
        if self.name in OTHERS:
            return Kind.OTHER
        if self.activity is not None:
            return Kind.ACTIVITY
        return Kind.SINGLE if self.count == 1 else Kind.COUNT

    @property
    def held_out(self) -> bool:
        """Whether the generator never sees this scene: 27 of the 135 pairs, 9 an activity."""
        if self.kind is not Kind.ACTIVITY:
            return False
        return ANIMALS.index(self.name) % 5 == ACTIVITIES.index(self.activity or "")

    @property
    def prompt(self) -> str:
        """The prompt of the scene: 'a cat', 'an ant playing chess', 'two cats'."""
        if self.count > 1:
            return f"{number_word(self.count)} {plural(self.name)}"
        words = with_article(self.name)
        return f"{words} {self.activity}" if self.activity else words

    @staticmethod
    def at(seed: int, index: int, *, all_pairs: bool = False) -> Scene:
        """Return the scene of image `index` of a seed.

        Kinds are sampled by `KIND_FREQUENCIES`, and scenes of a kind with equal probability.

        Args:
            seed: Identifies an endless sequence.
            index: Position in the sequence.
            all_pairs: Whether held-out pairs are included.
        """
        rng = np.random.default_rng((seed, index, 0))
        kind = Kind(rng.choice([*KIND_FREQUENCIES], p=[*KIND_FREQUENCIES.values()]))
        choices = scenes(kind) if all_pairs else trained_scenes(kind)
        return choices[int(rng.integers(len(choices)))]


@cache
def scenes(kind: Kind) -> tuple[Scene, ...]:
    """Return all scenes of a kind: 45 singles, 135 activities, 135 counts, 24 others."""
    match kind:
        case Kind.SINGLE:
            return tuple(Scene(animal) for animal in ANIMALS)
        case Kind.ACTIVITY:
            return tuple(Scene(animal, doing) for animal in ANIMALS for doing in ACTIVITIES)
        case Kind.COUNT:
            return tuple(Scene(animal, count=count) for animal in ANIMALS for count in COUNTS)
        case Kind.OTHER:
            return tuple(Scene(name) for name in OTHERS)


@cache
def trained_scenes(kind: Kind) -> tuple[Scene, ...]:
    """Return the scenes of a kind that the generator is trained on."""
    return tuple(scene for scene in scenes(kind) if not scene.held_out)


SCENES: tuple[Scene, ...] = tuple(scene for kind in Kind for scene in scenes(kind))
"""All 339 scenes; a scene's index is its number."""

SCENE_NUMBERS: dict[Scene, int] = {scene: number for number, scene in enumerate(SCENES)}
"""Each scene's index in `SCENES`."""
