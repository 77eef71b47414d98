"""VQA by the starter's judge: does an image show the scene that its prompt describes?

The embedded counterpart of asking a vision-language model (arXiv 2305.13301, section 5.2): the
judge has a head per question, and knows the animals, activities and numbers of the starter's
prompts.

The reward is the mean probability of the right answers, which is the expected share of right
answers. Compared with its alternatives:

- The share of *most likely* answers that are right takes few values, so images of one prompt mostly
  score alike and nothing tells them apart.
- The mean log-probability has no lower bound: one hopeless image dominates a prompt's standard
  deviation, and confidence is still rewarded where the answer is already right.
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
from ddpo.basics.english import number_word
from ddpo.errors import ConfigError, RewardError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.starter import JUDGE_PATH

if TYPE_CHECKING:
    from ddpo.starter.judge import Judge
    from ddpo.starter.scenes import Scene

# The judge and its scenes import transformers, so they are imported by the first call.

Question = Literal["species", "activity", "count"]

QUESTIONS: tuple[Question, ...] = ("species", "activity", "count")
"""The judge's questions: which animal (or other word), doing what, how many."""

_HEADS: Mapping[Question, str] = {"species": "name", "activity": "activity", "count": "count"}
_JUDGE_FILES = (
    "config.json",
    "heads.safetensors",
    "labels.json",
    "model.safetensors",
    "preprocessor_config.json",
)
_NO_ACTIVITY = "none"
_NO_SCENE = (
    "the prompt is not a scene of the starter, such as 'a cat', 'a cat riding a bike', 'two cats'"
)


class StarterVqa:
    """Reward = mean probability of the right answers to the questions about the prompt's scene.

    In 0..1. What a prompt does not mention is asked too: 'a cat' means one cat without an activity.
    Columns: ``p_<question>``, the probability of the right answer; ``seen_<question>``, the most
    likely answer (the activity may be ``none``); ``vqa_error``, which says why a sample failed: its
    prompt is not a scene. There are columns for all three questions, whichever count.

    A scene is one of ``ddpo.starter.scenes.SCENES``, identified by its prompt, with or without the
    article, in any case.

    Args:
        questions: The questions that count.

    Raises:
        ConfigError: A question is listed twice.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "prompts of the starter's scenes"

    def __init__(
        self, questions: Annotated[tuple[Question, ...], Field(min_length=1)] = QUESTIONS
    ) -> None:
        if len(set(questions)) != len(questions):
            raise ConfigError(f"questions lists one twice: {', '.join(questions)}")
        self._questions = questions
        self._digest = judge_digest()
        self.revisions = {"starter judge": self._digest}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images, resized to 64x64 px."""
        scenes = [scene_of(prompt.text) for prompt in prompts]
        # One at a time: in a batch, the last digits would depend on the other images.
        judge = _judge(self._digest)
        answers = [
            _answer(judge, image, scene) for image, scene in zip(images, scenes, strict=True)
        ]
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
    """Return the scene that a prompt describes; None if the judge knows no such scene."""
    return _scene_by_words().get(" ".join(text.casefold().split()))


def judge_digest() -> str:
    """Return the sha256 of the judge's files: other weights are another reward."""
    digests = {name: sha256_bytes((JUDGE_PATH / name).read_bytes()) for name in _JUDGE_FILES}
    return json_digest(digests)


@dataclass(frozen=True)
class _Answer:
    right: Mapping[Question, float]  # probability of the right answer; nan without a scene
    seen: Mapping[Question, str | int]  # the most likely answer


def _answer(judge: Judge, image: Image.Image, scene: Scene | None) -> _Answer:
    from ddpo.starter.judge import ACTIVITY_LABELS, COUNT_LABELS, NAME_LABELS

    verdicts = judge.look([image])
    seen: dict[Question, str | int] = {
        "species": verdicts.names[0],
        "activity": verdicts.activities[0] or _NO_ACTIVITY,
        "count": verdicts.counts[0],
    }
    if scene is None:
        return _Answer(dict.fromkeys(QUESTIONS, math.nan), seen)
    right: dict[Question, int] = {
        "species": NAME_LABELS.index(scene.name),
        "activity": ACTIVITY_LABELS.index(scene.activity or ""),
        "count": COUNT_LABELS.index(scene.count),
    }
    heads = verdicts.probabilities
    return _Answer({q: float(heads[_HEADS[q]][0, right[q]]) for q in QUESTIONS}, seen)


@functools.cache
def _scene_by_words() -> Mapping[str, Scene]:
    from ddpo.starter.scenes import SCENES

    scenes: dict[str, Scene] = {}
    for scene in SCENES:
        words = scene.prompt
        scenes[words.casefold()] = scene
        if scene.count == 1:
            without_article = words.split(" ", 1)[1]
            scenes[without_article] = scene
            scenes[f"{number_word(1)} {without_article}"] = scene
    return scenes


_LOADING = threading.Lock()


def _judge(digest: str) -> Judge:
    with _LOADING:  # concurrent threads wait for the one that loads
        return _loaded_judge(digest)


@functools.cache
def _loaded_judge(digest: str) -> Judge:
    from ddpo.starter.judge import Judge

    judge = Judge.load(JUDGE_PATH)
    if judge_digest() != digest:
        raise RewardError(
            f"the starter's judge in {JUDGE_PATH} has changed since the reward was built; restore "
            "its files (install ddpo again), or start another run"
        )
    return judge
