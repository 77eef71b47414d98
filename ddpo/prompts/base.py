"""A prompt, and drawing one from a set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from ddpo.basics.digests import json_digest
from ddpo.errors import ConfigError

if TYPE_CHECKING:
    import torch

_METADATA: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])


@dataclass(frozen=True)
class Prompt:
    """What a picture is asked for.

    Attributes:
        text: The words that the model is given; never blank.
        metadata: What rewards know about it beside the words, e.g. ``questions`` and ``answers``.
            Plain finite JSON.

    Raises:
        ConfigError: Blank text, text that is no string, or metadata that JSON cannot say.
    """

    text: str
    metadata: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        text: Any = self.text
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"a prompt is some words of text, not {text!r}")
        try:
            metadata = _METADATA.validate_python(dict(self.metadata))
            json.dumps(metadata, allow_nan=False)
        except (ValidationError, ValueError, TypeError) as error:
            raise ConfigError(
                f"metadata of the prompt {text!r} must be plain JSON (objects with string keys, "
                f"lists, strings, finite numbers, booleans, null): {error}"
            ) from error
        object.__setattr__(self, "metadata", metadata)


def draw_prompt(prompts: Sequence[Prompt], generator: torch.Generator) -> Prompt:
    """Draw one prompt, each entry with equal chance.

    Args:
        prompts: The set, not empty.
        generator: A CPU generator, so that a draw is the same on every device; advanced by one
            draw.

    Returns:
        The prompt.
    """
    import torch  # here, since a reward service needs prompts and no torch

    return prompts[int(torch.randint(len(prompts), (), generator=generator))]


def prompt_set_digest(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 of a set's contents, in order: what a file's name does not pin.

    Two sets of one digest draw the same prompts from the same generators.
    """
    return json_digest([[prompt.text, dict(prompt.metadata)] for prompt in prompts])
