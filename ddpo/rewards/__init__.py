"""Rewards: functions from images and prompts to `Scores`, found by name or import path."""

from ddpo.rewards.base import Reward, Scores
from ddpo.rewards.identity import RewardIdentity, source_digest
from ddpo.rewards.registry import available_rewards, load_reward
from ddpo.rewards.scoring import score_images

__all__ = [
    "Reward",
    "RewardIdentity",
    "Scores",
    "available_rewards",
    "load_reward",
    "score_images",
    "source_digest",
]
