"""A prompt, and sampling one from a set."""

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
    """What an image is generated for.

    Raises:
        ConfigError: The text is blank, not a string or not Unicode, or the metadata is not plain
            JSON.
    """

    text: str
    """The model's input; never blank."""
    metadata: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)
    """What rewards know about the prompt besides the text, such as ``questions`` and ``answers``.
    Plain finite JSON."""

    def __post_init__(self) -> None:
        text: Any = self.text
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"a prompt must be text that is not blank, not {text!r}")
        _check_unicode(text, f"the prompt {text!r}")
        try:
            metadata = _METADATA.validate_python(dict(self.metadata))
            written = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
        except (ValidationError, ValueError, TypeError) as error:
            raise ConfigError(
                f"metadata of the prompt {text!r} must be plain JSON (objects with string keys, "
                f"lists, strings, finite numbers, booleans, null): {error}"
            ) from error
        _check_unicode(written, f"metadata of the prompt {text!r}")
        object.__setattr__(self, "metadata", metadata)


def _check_unicode(text: str, what: str) -> None:
    """Refuse what no file and no text encoder takes, such as a name in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} has half of a surrogate pair at character {error.start + 1}, which is not "
            "Unicode text; write the whole character, in UTF-8"
        ) from error


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
    """Return the sha256 of a set's contents, in order, which a file's name does not pin.

    Sets of equal digest give the same prompts for the same generators.
    """
    return json_digest([[prompt.text, dict(prompt.metadata)] for prompt in prompts])
