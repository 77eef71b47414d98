"""Rewards as people see them: what is available, and how one scores a few images of their own."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import JsonValue

from ddpo.basics import plugins
from ddpo.basics.images import DECODING_ERRORS, PIXEL_LIMIT, as_rgb
from ddpo.errors import ConfigError
from ddpo.prompts import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.registry import available_rewards, find_reward

_MODULE = re.compile(r"\b(?:typing|collections\.abc|ddpo(?:\.\w+)*)\.")


@dataclass(frozen=True)
class ParameterDescription:
    """A parameter that a config may give to a reward."""

    name: str
    """Its key under `parameters`."""
    type: str
    """Its annotation, as written in Python."""
    default: str | None
    """As JSON; None if it has no default, so that a config must set it."""


@dataclass(frozen=True)
class RewardDescription:
    """What is known about a reward without building it."""

    name: str
    """As a config names it."""
    summary: str
    """First line of its docstring, or why it cannot be imported."""
    needs: str
    """What it needs besides images and prompts: its attribute ``needs``."""
    parameters: tuple[ParameterDescription, ...]
    """The parameters that it takes."""


def describe_rewards() -> list[RewardDescription]:
    """Describe all rewards that have a name, including those of entry points, sorted by name."""
    return [_describe(name) for name in available_rewards()]


def read_image(path: Path) -> Image.Image:
    """Read an image of any format that Pillow knows, as RGB.

    Raises:
        ConfigError: The file is not an image, is damaged, has more than 4096x4096 pixels, or has
            pixels of 32 bits.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise ConfigError(
                    f"{path} has {image.width}x{image.height} pixels; at most 4096x4096 are allowed"
                )
            return as_rgb(image)
    except DECODING_ERRORS as error:
        raise ConfigError(f"cannot read {path} as an image: {error}") from error


def prompts_for(
    texts: Sequence[str], count: int, metadata: Mapping[str, JsonValue] | None = None
) -> list[Prompt]:
    """Return one prompt per image.

    Args:
        texts: One text for all images, or one for each.
        count: Number of images.
        metadata: What rewards know about the prompts besides the text; the same for all.

    Raises:
        ConfigError: The number of texts is neither 1 nor the number of images.
    """
    if len(texts) not in (1, count):
        raise ConfigError(
            f"got {count} images and {len(texts)} prompts; give one --prompt for all images, or "
            "one for each (a reward that ignores prompts accepts any text)"
        )
    every = list(texts) * (count if len(texts) == 1 else 1)
    return [Prompt(text, metadata or {}) for text in every]


def findings(scores: Scores) -> dict[str, list[str]]:
    """Format the scores of B images for display.

    Returns:
        B texts for ``reward`` (``failed`` where there is no score) and for each of the reward's
        own columns. Numbers have 4 significant digits; what is missing is blank.
    """
    rewards = [
        "failed" if failed else f"{value:.4g}"
        for value, failed in zip(scores.values.tolist(), scores.failed.tolist(), strict=True)
    ]
    columns = {name: [_shown(value) for value in column] for name, column in scores.columns.items()}
    return {"reward": rewards, **columns}


def _describe(name: str) -> RewardDescription:
    try:
        target, parameters = find_reward(name)
    except ConfigError as error:  # of another package; the others are still to be listed
        return RewardDescription(name, str(error), "", ())
    summary = (inspect.getdoc(target) or "").partition("\n")[0].replace("``", "`")
    return RewardDescription(
        name, summary, getattr(target, "needs", ""), tuple(_described(name, target, parameters))
    )


def _described(
    name: str, target: Any, parameters: Sequence[inspect.Parameter]
) -> list[ParameterDescription]:
    try:
        hints = plugins.type_hints(name, target, parameters, include_extras=False)
    except ConfigError:  # an annotation that only a type checker can evaluate is shown as written
        hints = {}
    return [
        ParameterDescription(
            parameter.name,
            _MODULE.sub(
                "",
                inspect.formatannotation(hints.get(parameter.name, parameter.annotation)),
            )
            if parameter.annotation is not parameter.empty
            else "any",
            None
            if parameter.default is parameter.empty
            else json.dumps(parameter.default, default=str),
        )
        for parameter in parameters
    ]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
