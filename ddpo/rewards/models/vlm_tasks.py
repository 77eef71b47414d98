"""Two tasks scored by a vision-language model, wherever it runs: alignment and VQA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.answers import Question, questions_of, share_of_right
from ddpo.rewards.models.bert_recall import BertRecall

QUESTION = "Answer concisely: what is going on in this image?"
"""The DDPO paper's question (arXiv 2305.13301)."""

TEMPLATE = "The image contains {prompt}"
"""What the answer is compared with."""

_PROMPT = "{prompt}"


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question."""

    text: str
    """Without surrounding whitespace; empty if there is no answer."""
    error: str = ""
    """Why there is no answer; empty if there is one."""


Ask = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[Answer]]
"""Asks N questions, each about the image with the same index; returns N answers."""

EMPTY_ANSWER = "the model's answer is empty"


def check_template(template: str) -> str:
    """Return a template, checked to have a placeholder for the prompt.

    Raises:
        ConfigError: It has none.
    """
    if _PROMPT not in template:
        raise ConfigError(
            f"template is {template!r}, without {_PROMPT}; every image would be compared with the "
            f"same words. Write it as in {TEMPLATE!r}"
        )
    return template


def score_alignment(
    images: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    ask: Ask,
    bert: BertRecall,
    question: str,
    template: str,
) -> Scores:
    """Score the model's descriptions of B images against their prompts.

    Args:
        images: B images.
        prompts: B prompts.
        ask: Asks the model.
        bert: Compares its answers.
        question: What is asked about every image.
        template: What an answer is compared with; ``{prompt}`` stands for the prompt's text.

    Returns:
        BERTScore's recall, with the columns ``caption``, ``bert_precision``, ``bert_f1`` and
        ``vlm_error``. A sample without an answer fails.
    """
    answers = ask(images, [question] * len(images))
    values, precisions, f1s = (np.full(len(images), math.nan, np.float32) for _ in range(3))
    for index, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        if not answer.error:
            match = bert.compare(answer.text, template.replace(_PROMPT, prompt.text))
            values[index], precisions[index], f1s[index] = match.recall, match.precision, match.f1
    return Scores(
        values,
        failed=np.array([bool(answer.error) for answer in answers], bool),
        columns={
            "caption": [answer.text for answer in answers],
            "bert_precision": precisions.tolist(),
            "bert_f1": f1s.tolist(),
            "vlm_error": [answer.error for answer in answers],
        },
    )


def score_questions(images: Sequence[Image.Image], prompts: Sequence[Prompt], ask: Ask) -> Scores:
    """Score B images by the questions of their prompts.

    Args:
        images: B images.
        prompts: B prompts, with ``questions`` and ``answers`` in their metadata.
        ask: Asks the model.

    Returns:
        The share of right answers, with the columns ``vqa_answers`` (JSON text) and ``vqa_error``.
        A sample fails if its prompt has no questions, or if one of them gets no answer.
    """
    errors: list[str] = []
    per_image: list[tuple[Question, ...]] = []
    for prompt in prompts:
        try:
            per_image.append(questions_of(prompt))
            errors.append("")
        except RewardError as error:
            per_image.append(())
            errors.append(str(error))
    pairs = [
        (image, question.text)
        for image, questions in zip(images, per_image, strict=True)
        for question in questions
    ]
    answers = iter(ask([image for image, _ in pairs], [text for _, text in pairs]))
    values = np.full(len(images), math.nan, np.float32)
    texts = [""] * len(images)
    for index, questions in enumerate(per_image):
        if not questions:
            continue
        replies: list[Answer] = [next(answers) for _ in questions]
        errors[index] = "; ".join(dict.fromkeys(reply.error for reply in replies if reply.error))
        if not errors[index]:
            values[index], texts[index] = share_of_right(questions, [r.text for r in replies])
    return Scores(
        values,
        failed=np.array([bool(error) for error in errors], bool),
        columns={"vqa_answers": texts, "vqa_error": errors},
    )
