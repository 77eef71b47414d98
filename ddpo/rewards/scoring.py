"""Calling a reward, with what it returns and what it raises made uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ddpo.errors import RewardError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Reward, Scores


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
        raise RewardError(f"{who}: {error}") from error
    except Exception as error:
        raise RewardError(f"{who} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(images):
        raise RewardError(
            f"{who} returned {len(scores)} scores for {len(images)} images; return one for each, "
            "and mark those that failed in Scores.failed"
        )
    return scores


def as_scores(result: Any) -> Scores:
    """Return what a reward returned (`Scores`, or B numbers in a list or array) as `Scores`."""
    return result if isinstance(result, Scores) else Scores(values=result)
