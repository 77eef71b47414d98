"""Read a request's body, counting it as it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ddpo.errors import ConfigError
from ddpo.prompts.base import Prompt
from ddpo.rewards.service.limits import Limits, refusal
from ddpo.rewards.service.wire import PromptMessage, describe_problems

_LONGEST_BOUNDARY = 70  # RFC 2046
_PROMPTS: TypeAdapter[list[PromptMessage]] = TypeAdapter(list[PromptMessage])


@dataclass(frozen=True)
class Batch:
    """The content of a request."""

    images: Sequence[bytes | bytearray]
    """B encoded images."""
    prompts: Sequence[Prompt]
    """B prompts."""


class Form:
    """The parts of a multipart body, parsed as it arrives and rejected as soon as it is too large.

    Args:
        boundary: The separator of the parts, from the request's header.
        limits: Bounds of a request.
    """

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self.images: list[bytearray] = []
        self.prompts: bytearray | None = None
        self.complete = False
        self._limits = limits
        self._part = bytearray()
        self._part_limit = 0
        self._part_name = ""
        self._field = self._value = self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
        )

    def write(self, piece: bytes) -> None:
        """Parse the next bytes of the body."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise refusal(400, f"the body is not a multipart form: {error}") from error

    def _on_part_begin(self) -> None:
        self._field = self._value = self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode("latin-1")
        self._part = bytearray()
        if name == "images":
            if len(self.images) == self._limits.images:
                raise refusal(
                    413, f"more than {self._limits.images} images in one request; send fewer"
                )
            self._part_name, self._part_limit = (
                f"image {len(self.images)}",
                self._limits.image_bytes,
            )
            self.images.append(self._part)
        elif name == "prompts":
            if self.prompts is not None:
                raise refusal(
                    422, "there are two parts 'prompts'; expected one JSON array with all prompts"
                )
            self._part_name, self._part_limit = "'prompts'", self._limits.prompts_bytes
            self.prompts = self._part
        else:
            raise refusal(
                422, f"a part is named {name!r}; expected one 'prompts', and one 'images' per image"
            )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._part) + end - start > self._part_limit:
            raise refusal(413, f"{self._part_name} has more than {self._part_limit} bytes")
        self._part += data[start:end]

    def _on_end(self) -> None:
        self.complete = True


async def read_batch(request: Request, limits: Limits, hold: Callable[[int], None]) -> Batch:
    """Read a request, counting its bytes as they arrive.

    Args:
        request: The request; its body is consumed.
        limits: Bounds of a request.
        hold: Called with the number of bytes of each chunk; may reject the request.

    Returns:
        One or more encoded images, and a prompt for each.

    Raises:
        HTTPException: The body is malformed, exceeds a limit, or arrived too slowly.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or "content-encoding" in request.headers:
        raise refusal(
            415, "expected an unencoded multipart/form-data body with 'prompts' and 'images'"
        )
    if not 1 <= len(boundary) <= _LONGEST_BOUNDARY:
        raise refusal(400, f"the boundary must have 1 to {_LONGEST_BOUNDARY} characters")
    too_long = f"the body has more than {limits.body_bytes} bytes; send fewer images at once"
    claimed = request.headers.get("content-length", "0")
    if claimed.isdecimal() and int(claimed) > limits.body_bytes:
        raise refusal(413, too_long)
    form = Form(boundary, limits)
    count = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                count += len(piece)
                if count > limits.body_bytes:
                    raise refusal(413, too_long)
                hold(len(piece))
                form.write(piece)
    except TimeoutError as error:
        raise refusal(408, f"the body did not arrive within {limits.body_seconds:g} s") from error
    if not form.complete:
        raise refusal(400, "the body ends before its last boundary")
    if form.prompts is None or not form.images:
        raise refusal(422, "expected a part 'prompts', and a part 'images' for each image")
    prompts = _read_prompts(bytes(form.prompts))
    if len(prompts) != len(form.images):
        raise refusal(
            422, f"{len(form.images)} images with {len(prompts)} prompts; give one prompt per image"
        )
    return Batch(form.images, prompts)


def _read_prompts(data: bytes) -> list[Prompt]:
    try:
        messages = _PROMPTS.validate_json(data)
    except ValidationError as error:
        problems = describe_problems(error, "the part")
        raise refusal(
            422, f"'prompts' is not a JSON array of {{text, metadata}} objects: {problems}"
        ) from error
    prompts = []
    for index, message in enumerate(messages):
        try:
            prompts.append(Prompt(message.text, message.metadata))
        except ConfigError as error:
            raise refusal(422, f"prompt {index}: {error}") from error
    return prompts
