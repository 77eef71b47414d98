"""Small JSON documents (manifests, run records) that carry their own checksum.

They are looked up by name, not by digest, so each must prove its own integrity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from ddpo.basics.digests import canonical_json, json_digest, sha256_bytes
from ddpo.basics.validation import in_one_line
from ddpo.errors import CorruptObject, UnknownSchema, UnreadableData

CHECKSUM = "checksum"
"""Key of the sha256 over the canonical JSON of the document without this key."""


SCHEMA_VERSION = 1
"""Version of the layout of every document."""


class Sealed(BaseModel):
    """Base class of documents that a store keeps by name."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="constants",  # which `canonical_json` refuses, where null would be stored
    )

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""

    def to_bytes(self) -> bytes:
        """Return the canonical JSON with its checksum."""
        return seal(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, key: str, data: bytes) -> Self:
        """Parse and verify a document; `key` is for error messages.

        Raises:
            UnreadableData: The bytes are not such a document.
            UnknownSchema: Another release wrote it.
            CorruptObject: The checksum does not match.
        """
        try:
            return cls.model_validate(unseal(key, data))
        except ValidationError as error:
            raise UnreadableData(key, in_one_line(error)) from error


def seal(document: Mapping[str, Any]) -> bytes:
    """Return the document's canonical JSON with its checksum added."""
    return canonical_json({**document, CHECKSUM: json_digest(document)})


def unseal(key: str, data: bytes) -> dict[str, JsonValue]:
    """Parse and verify a sealed document.

    Args:
        key: Its key, for error messages.
        data: Its bytes.

    Returns:
        The document without its checksum.

    Raises:
        UnreadableData: Not a JSON object.
        UnknownSchema: Another schema version.
        CorruptObject: The checksum does not match.
    """
    try:
        document = json.loads(data)
        canonical_json(document)  # NaN and broken Unicode pass json.loads
    except ValueError as error:
        raise UnreadableData(key, f"{error} (sha256 of the bytes: {sha256_bytes(data)})") from error
    if not isinstance(document, dict):
        raise UnreadableData(key, f"it holds a JSON {type(document).__name__}, not an object")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise UnknownSchema(key, document.get("schema_version"), SCHEMA_VERSION)
    expected = str(document.pop(CHECKSUM, "none"))
    found = json_digest(document)
    if expected != found:
        raise CorruptObject(key, expected, found)
    return document


@dataclass(frozen=True)
class Difference:
    """One value that differs between two JSON documents."""

    key: str
    """Dotted path of the value."""
    stored: str
    """The value in the store as JSON, 'absent' if there is none."""
    wanted: str
    """The caller's value as JSON, 'absent' if there is none."""

    def __str__(self) -> str:
        return f"{self.key}: {self.stored} in the store, {self.wanted} in the config"


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> tuple[Difference, ...]:
    """Return the values that differ, sorted by dotted key.

    Compares canonical JSON: 1, 1.0 and true all differ, a list and a tuple do not.

    Args:
        stored: The document in the store.
        wanted: The caller's.
        prefix: Dotted path of both within their documents.
    """
    found: list[Difference] = []
    for name in sorted(stored.keys() | wanted.keys()):
        key = f"{prefix}.{name}" if prefix else name
        left, right = stored.get(name, _ABSENT), wanted.get(name, _ABSENT)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found.extend(differences(left, right, key))
        elif _text(left) != _text(right):
            found.append(Difference(key, _shown(left), _shown(right)))
    return tuple(found)


_ABSENT = object()


def _text(value: object) -> str:
    return "absent" if value is _ABSENT else canonical_json(value).decode()


def _shown(value: object) -> str:
    text = _text(value)
    if len(text) <= 160:
        return text
    return f"{text[:120]}... ({len(text)} characters, sha256 {sha256_bytes(text.encode())[:8]})"
