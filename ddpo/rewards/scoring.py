"""Calling a reward, with what it returns and what it raises made uniform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ddpo.basics.redaction import hide_credentials
from ddpo.errors import RewardError, RewardUnavailable
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Reward, Scores

MARKED = "failed"
"""Status of a sample that the reward itself marked as failed."""

_LONGEST_REASON = 300


def score_images(
    reward: Reward, images: Sequence[Image.Image], prompts: Sequence[Prompt]
) -> Scores:
    """Score pictures.

    Args:
        reward: What to score them with.
        images: B pictures.
        prompts: B prompts; prompt i is the one that image i was drawn for.

    Returns:
        The scores of all B.

    Raises:
        RewardError: The reward raised (its exception is the cause), returned another number of
            scores, or scores that `Scores` refuses. Says which reward.
    """
    if len(images) != len(prompts):
        raise RewardError(f"{len(images)} images with {len(prompts)} prompts; give one for each")
    who = f"reward {reward.identity.reward_id}"
    try:
        scores = as_scores(reward(images, prompts))
    except RewardError as error:
        raise type(error)(f"{who}: {error}") from error
    except Exception as error:
        raise RewardError(f"{who} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(images):
        raise RewardError(
            f"{who} returned {len(scores)} scores for {len(images)} images; return one for each, "
            "and mark those that failed in Scores.failed"
        )
    return scores


@dataclass(frozen=True)
class SampleScore:
    """What became of one sample.

    Attributes:
        value: Its reward, None where it could not be scored.
        status: 'ok', or why it could not be scored.
        columns: The reward's own findings.
    """

    value: float | None
    status: str
    columns: Mapping[str, Any]


def score_samples(
    reward: Reward, images: Sequence[Image.Image], prompts: Sequence[Prompt], *, tries: int
) -> list[SampleScore]:
    """Score pictures so that one which cannot be scored never stops the others.

    Where a batch raises, each of its pictures is scored by itself: what is scored together changes
    no score.

    Args:
        reward: What to score them with.
        images: B pictures.
        prompts: B prompts.
        tries: How often a picture is scored before it counts as failed.

    Returns:
        B outcomes.

    Raises:
        RewardUnavailable: The reward cannot be reached.
        RewardError: It raised for every single picture: the reward is broken, not a picture.
    """
    first: RewardError | None = None
    try:
        outcomes = _outcomes(score_images(reward, images, prompts))
    except RewardUnavailable:
        raise
    except RewardError as error:
        first = error
        outcomes = [_failed(error)] * len(images)
    for _ in range(tries - (first is None)):
        for index, outcome in enumerate(outcomes):
            if outcome.value is None:
                outcomes[index] = _alone(reward, images[index], prompts[index])
    if first is not None and all(outcome.value is None for outcome in outcomes):
        raise first
    return outcomes


def _alone(reward: Reward, image: Image.Image, prompt: Prompt) -> SampleScore:
    try:
        return _outcomes(score_images(reward, [image], [prompt]))[0]
    except RewardUnavailable:
        raise
    except RewardError as error:
        return _failed(error)


def _outcomes(scores: Scores) -> list[SampleScore]:
    return [
        SampleScore(
            value=None if scores.failed[index] else float(scores.values[index]),
            status=MARKED if scores.failed[index] else "ok",
            columns={
                name: column[index]
                for name, column in scores.columns.items()
                if column[index] is not None
            },
        )
        for index in range(len(scores))
    ]


def _failed(error: RewardError) -> SampleScore:
    return SampleScore(None, hide_credentials(str(error))[:_LONGEST_REASON], {})


def as_scores(result: Any) -> Scores:
    """Return what a reward returned (`Scores`, or B numbers in a list or array) as `Scores`."""
    return result if isinstance(result, Scores) else Scores(values=result)
