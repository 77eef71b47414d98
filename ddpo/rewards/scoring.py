"""Call a reward, with uniform results and errors."""

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
    """Score B images, each generated for the prompt with the same index.

    Raises:
        RewardError: The reward raised (its exception is the cause), or returned invalid scores or
            not B of them. Names the reward.
    """
    if len(images) != len(prompts):
        raise RewardError(
            f"{len(images)} images with {len(prompts)} prompts; give one prompt per image"
        )
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
            "and mark samples that failed in Scores.failed"
        )
    return scores


@dataclass(frozen=True)
class SampleScore:
    """The outcome of scoring one sample."""

    value: float | None
    """Its reward; None if it could not be scored."""
    status: str
    """'ok', or why it could not be scored."""
    columns: Mapping[str, Any]
    """The values of the reward's own columns."""


def score_samples(
    reward: Reward, images: Sequence[Image.Image], prompts: Sequence[Prompt], *, tries: int
) -> list[SampleScore]:
    """Score B images so that one that cannot be scored does not affect the others.

    If a batch raises, its images are scored one by one; a score does not depend on its batch.

    Args:
        reward: The reward.
        images: B images.
        prompts: B prompts.
        tries: How often an image is scored before it counts as failed.

    Returns:
        B outcomes.

    Raises:
        RewardUnavailable: The reward cannot be reached.
        RewardError: It raised for every single image, so that the reward itself must be broken.
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
    """Convert what a reward returned, `Scores` or B numbers in a list or array, to `Scores`."""
    return result if isinstance(result, Scores) else Scores(values=result)
