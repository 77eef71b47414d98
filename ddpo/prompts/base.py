"""A prompt, and sampling one from a set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import JsonValue, TypeAdapter, ValidationError

from ddpo.basics.digests import json_digest
from ddpo.errors import ConfigError

if TYPE_CHECKING:
    import torch

_METADATA: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])


class Prompt(str):
    """What an image is generated for: a text, with what rewards know about it besides.

    It is a `str`, so a reward may treat it as the text that it is. Two prompts are equal if both
    text and metadata are; a prompt equals a plain string if the text does.

    Raises:
        ConfigError: The text is blank, not a string or not Unicode, or the metadata is not plain
            JSON.
    """

    __slots__ = ("_metadata",)

    def __new__(cls, text: str, metadata: Mapping[str, JsonValue] | None = None) -> Self:
        """Make a prompt.

        Args:
            text: The model's input; not blank.
            metadata: Plain finite JSON.
        """
        given: Any = text
        if not isinstance(given, str) or not given.strip():
            raise ConfigError(f"a prompt must be text that is not blank, not {given!r}")
        _check_unicode(given, f"the prompt {given!r}")
        prompt = super().__new__(cls, given)
        try:
            prompt._metadata = _METADATA.validate_python(dict(metadata or {}))
            written = json.dumps(prompt._metadata, allow_nan=False, ensure_ascii=False)
        except (ValidationError, ValueError, TypeError) as error:
            raise ConfigError(
                f"metadata of the prompt {str(given)!r} must be plain JSON (objects with string "
                f"keys, lists, strings, finite numbers, booleans, null): {error}"
            ) from error
        _check_unicode(written, f"metadata of the prompt {str(given)!r}")
        return prompt

    @property
    def text(self) -> str:
        """The model's input; never blank."""
        return str(self)

    @property
    def metadata(self) -> Mapping[str, JsonValue]:
        """What rewards know besides the text, such as ``questions`` and ``answers``."""
        return self._metadata

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Prompt):
            return str(self) == str(other) and self._metadata == other._metadata
        return str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return str.__hash__(self)

    def __repr__(self) -> str:
        return f"Prompt({str(self)!r}, {self._metadata!r})"


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
