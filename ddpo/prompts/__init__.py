"""Prompt sets: finite, found by name or import path, sampled uniformly."""

from ddpo.prompts.base import Prompt, draw_prompt, prompt_set_digest
from ddpo.prompts.registry import available_prompt_sets, load_prompts
from ddpo.prompts.sets import ACTIVITIES, ANIMALS, IMAGENET_ANIMALS

__all__ = [
    "ACTIVITIES",
    "ANIMALS",
    "IMAGENET_ANIMALS",
    "Prompt",
    "available_prompt_sets",
    "draw_prompt",
    "load_prompts",
    "prompt_set_digest",
]
