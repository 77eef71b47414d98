"""Questions about a picture, answered by the starter's judge: does it show the scene asked for?

The embedded counterpart of asking a vision-language model (arXiv 2305.13301, section 5.2): the
judge has a head for each question, and knows the animals, activities and numbers of the starter's
prompts.

The reward is the mean probability of the right answers, which is the share of right answers to be
expected. Compared with its alternatives:

- The share of *likeliest* answers that are right takes few values, so pictures of one prompt are
  mostly alike and nothing tells them apart.
- The mean log-probability has no floor: one hopeless picture sets a prompt's standard deviation,
  and it goes on paying for confidence where the answer is right already.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from ddpo.basics.digests import json_digest, sha256_bytes
from ddpo.errors import ConfigError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.starter import JUDGE_PATH

if TYPE_CHECKING:
    from ddpo.starter.judge import Judge
    from ddpo.starter.scenes import Scene

# Importing the judge or its scenes imports transformers: that waits for the first call.

Question = Literal["species", "activity", "count"]

QUESTIONS: tuple[Question, ...] = ("species", "activity", "count")
"""What the judge is asked: which animal (or other word), doing what, how many."""

_HEADS: Mapping[Question, str] = {"species": "name", "activity": "activity", "count": "count"}
_SEES_WITH = (
    "config.json",
    "heads.safetensors",
    "labels.json",
    "model.safetensors",
    "preprocessor_config.json",
)
_NO_ACTIVITY = "none"
_NO_SCENE = (
    "the prompt names no scene of the starter, such as 'a cat', 'a cat riding a bike', 'two cats'"
)


class StarterVqa:
    """Reward = mean probability, over the questions, of the answer that the prompt's scene has.

    What a prompt does not mention is asked too: of 'a cat' one cat without an activity. In 0..1.
    Columns: ``p_<question>``, the probability of the right answer; ``seen_<question>``, the
    likeliest answer (an activity is ``none`` where there is none); ``vqa_error``, which says why a
    sample failed: its prompt names no scene. All three questions are shown, whichever count.

    A scene is one of ``ddpo.starter.scenes.SCENES``, named as its prompt names it, with or without
    the article, whatever the case.

    Args:
        questions: Those that count.

    Raises:
        ConfigError: A question is named twice.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "prompts of the starter's scenes"

    def __init__(
        self, questions: Annotated[tuple[Question, ...], Field(min_length=1)] = QUESTIONS
    ) -> None:
        if len(set(questions)) != len(questions):
            raise ConfigError(f"questions names one twice: {', '.join(questions)}")
        self._questions = questions
        self.revisions = {"starter judge": judge_digest()}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images, resized to 64x64 px."""
        scenes = [scene_of(prompt.text) for prompt in prompts]
        # One by one: in a batch, company would show in the last digits.
        answers = [_answer(image, scene) for image, scene in zip(images, scenes, strict=True)]
        columns: dict[str, Sequence[object]] = {}
        for question in QUESTIONS:
            columns[f"p_{question}"] = [answer.right[question] for answer in answers]
            columns[f"seen_{question}"] = [answer.seen[question] for answer in answers]
        columns["vqa_error"] = ["" if scene else _NO_SCENE for scene in scenes]
        values = [
            math.fsum(answer.right[question] for question in self._questions) / len(self._questions)
            for answer in answers
        ]
        failed = np.array([scene is None for scene in scenes], bool)
        return Scores(np.array(values, np.float32), failed=failed, columns=columns)


def scene_of(text: str) -> Scene | None:
    """Return the scene that a prompt names; None where it names none that the judge knows."""
    return _scene_by_words().get(" ".join(text.casefold().split()))


def judge_digest() -> str:
    """Return the sha256 over what the judge sees with: other weights are another reward."""
    digests = {name: sha256_bytes((JUDGE_PATH / name).read_bytes()) for name in _SEES_WITH}
    return json_digest(digests)


@dataclass(frozen=True)
class _Answer:
    right: Mapping[Question, float]  # probability of the scene's own answer; nan without a scene
    seen: Mapping[Question, str | int]  # the likeliest answer


def _answer(image: Image.Image, scene: Scene | None) -> _Answer:
    from ddpo.starter.judge import ACTIVITY_LABELS, COUNT_LABELS, NAME_LABELS

    found = _judge().look([image])
    seen: dict[Question, str | int] = {
        "species": found.names[0],
        "activity": found.activities[0] or _NO_ACTIVITY,
        "count": found.counts[0],
    }
    if scene is None:
        return _Answer(dict.fromkeys(QUESTIONS, math.nan), seen)
    asked: dict[Question, int] = {
        "species": NAME_LABELS.index(scene.name),
        "activity": ACTIVITY_LABELS.index(scene.activity or ""),
        "count": COUNT_LABELS.index(scene.count),
    }
    heads = found.probabilities
    return _Answer({each: float(heads[_HEADS[each]][0, asked[each]]) for each in QUESTIONS}, seen)


@functools.cache
def _scene_by_words() -> Mapping[str, Scene]:
    from ddpo.starter.scenes import SCENES
    from ddpo.starter.text import number_word

    found: dict[str, Scene] = {}
    for scene in SCENES:
        words = scene.prompt
        found[words.casefold()] = scene
        if scene.count == 1:
            without_article = words.split(" ", 1)[1]
            found[without_article] = scene
            found[f"{number_word(1)} {without_article}"] = scene
    return found


_LOADING = threading.Lock()


def _judge() -> Judge:
    with _LOADING:  # threads that score at the same time wait for the one that loads
        return _loaded_judge()


@functools.cache
def _loaded_judge() -> Judge:
    from ddpo.starter.judge import Judge

    return Judge.load(JUDGE_PATH)
