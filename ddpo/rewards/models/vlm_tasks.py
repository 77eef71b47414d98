"""The two tasks that a vision-language model scores, whoever asks it: alignment, and questions."""

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
"""As the DDPO paper asks (arXiv 2305.13301)."""

TEMPLATE = "The image contains {prompt}"
"""What its answer is compared with."""

_PROMPT = "{prompt}"


@dataclass(frozen=True)
class Answer:
    """What a model said to a question.

    Attributes:
        text: Its words, without white space around them; empty where there are none.
        error: Why there are none; empty where there are.
    """

    text: str
    error: str = ""


Ask = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[Answer]]
"""Asks N questions, each about the picture of its own index; N answers."""

EMPTY_ANSWER = "the model's answer is empty"


def check_template(template: str) -> str:
    """Return a template that has room for the prompt.

    Raises:
        ConfigError: It has none.
    """
    if _PROMPT not in template:
        raise ConfigError(
            f"template is {template!r}, without {_PROMPT}; every picture would be compared with "
            f"the same words. Write it as in {TEMPLATE!r}"
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
    """Score what the model sees in B pictures against their prompts.

    Args:
        images: B pictures.
        prompts: B prompts.
        ask: Asks the model.
        bert: Compares its answers.
        question: What is asked about every picture.
        template: What an answer is compared with; ``{prompt}`` stands for the prompt's text.

    Returns:
        BERTScore's recall, with the columns ``caption``, ``bert_precision``, ``bert_f1`` and
        ``vlm_error``. A sample without an answer has failed.
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
    """Score B pictures by the questions that their prompts ask.

    Args:
        images: B pictures.
        prompts: B prompts, with ``questions`` and ``answers`` in their metadata.
        ask: Asks the model.

    Returns:
        The share of right answers, with the columns ``vqa_answers`` (JSON text) and ``vqa_error``.
        A sample has failed where its prompt has no questions, or one has no answer.
    """
    errors: list[str] = []
    asked: list[tuple[Question, ...]] = []
    for prompt in prompts:
        try:
            asked.append(questions_of(prompt))
            errors.append("")
        except RewardError as error:
            asked.append(())
            errors.append(str(error))
    pairs = [
        (image, question.text)
        for image, questions in zip(images, asked, strict=True)
        for question in questions
    ]
    answers = iter(ask([image for image, _ in pairs], [text for _, text in pairs]))
    values = np.full(len(images), math.nan, np.float32)
    texts = [""] * len(images)
    for index, questions in enumerate(asked):
        if not questions:
            continue
        said: list[Answer] = [next(answers) for _ in questions]
        errors[index] = "; ".join(dict.fromkeys(each.error for each in said if each.error))
        if not errors[index]:
            values[index], texts[index] = share_of_right(questions, [each.text for each in said])
    return Scores(
        values,
        failed=np.array([bool(error) for error in errors], bool),
        columns={"vqa_answers": texts, "vqa_error": errors},
    )
