"""Call a reward, with uniform results and errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ddpo.basics.redaction import hide_credentials
from ddpo.errors import RewardError, RewardUnavailable, UnusableScores
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Reward, Scores
from ddpo.rewards.columns import storable

MARKED = "failed"
"""Status of a sample that the reward itself marked as failed."""

FAULTS = (Exception, SystemExit, asyncio.CancelledError)
"""What a user's code may raise; the last two would end a thread or a process silently."""

_LONGEST_REASON = 300

_logger = logging.getLogger(__name__)
_slow: set[str] = set()
"""Rewards about which a warning says that their images are scored one by one."""


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
        named = type(error)(f"{who}: {error}")
        named.reason = error.reason
        raise named from error
    except FAULTS as error:
        raise RewardError(f"{who} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(images):
        raise UnusableScores(
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

    If a batch raises twice, its images are scored one by one; a warning is shown once per reward.

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
    outcomes, first = _together(reward, images, prompts)
    for _ in range(tries - (first is None)):
        for index, outcome in enumerate(outcomes):
            if outcome.value is None:
                outcomes[index] = _alone(reward, images[index], prompts[index])
    if first is not None and all(outcome.value is None for outcome in outcomes):
        raise first
    return _uniform(outcomes)


def _together(
    reward: Reward, images: Sequence[Image.Image], prompts: Sequence[Prompt]
) -> tuple[list[SampleScore], RewardError | None]:
    """Score a batch, and once more if it raises; return the first error if it does again.

    A reward may round by its batch, and an error that passes must not change any score.
    """
    first: RewardError | None = None
    for _ in range(2 if len(images) > 1 else 1):
        try:
            return _outcomes(score_images(reward, images, prompts)), None
        except RewardUnavailable:
            raise
        except RewardError as error:
            first = first or error
    assert first is not None
    if len(images) > 1:
        _say_one_by_one(reward.identity.reward_id, len(images), first)
    return [_failed(first)] * len(images), first


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
    return SampleScore(None, hide_credentials(error.reason or str(error))[:_LONGEST_REASON], {})


def _uniform(outcomes: Sequence[SampleScore]) -> list[SampleScore]:
    """Give each column one type, whichever samples were scored together."""
    names = sorted({name for outcome in outcomes for name in outcome.columns})
    given = {name: [outcome.columns.get(name) for outcome in outcomes] for name in names}
    columns = storable(given, len(outcomes))
    return [
        replace(outcome, columns={n: c[row] for n, c in columns.items() if c[row] is not None})
        for row, outcome in enumerate(outcomes)
    ]


def _say_one_by_one(reward_id: str, count: int, error: RewardError) -> None:
    if reward_id in _slow:
        return
    _slow.add(reward_id)
    _logger.warning(
        "a batch of %d images could not be scored at once, so they are scored one by one, which is "
        "slower: %s (shown once)",
        count,
        hide_credentials(str(error)),
    )


def as_scores(result: Any) -> Scores:
    """Convert what a reward returned to `Scores`.

    Args:
        result: `Scores`; B numbers as a list, an array or a tensor; or a pair of those and a
            mapping of columns, as rewards of other trainers return.
    """
    if isinstance(result, Scores):
        return result
    if result is None:
        raise UnusableScores("it returned None; return one number per image")
    if asyncio.iscoroutine(result):
        result.close()
        raise UnusableScores("it returned a coroutine; write it as a plain function, without async")
    values, columns = result if _is_pair(result) else (result, {})
    return Scores(values, columns=columns)


def _is_pair(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)
