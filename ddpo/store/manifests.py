"""Manifests, which commit objects.

A manifest is created last and exclusively, so the first writer wins: a later writer with the same
inputs gets the first one's commit, and one with other inputs gets an error that names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue

from ddpo.basics.digests import canonical_json, sha256_bytes
from ddpo.errors import ConflictingCommit, CorruptObject, MissingObject
from ddpo.store import keys
from ddpo.store.documents import Difference, Sealed, differences
from ddpo.store.objects import Key, Sha256, Store, StoredObject

T = TypeVar("T", covariant=True)


class Manifest(Sealed):
    """What was made, from what, and its objects. Contains no times, hosts or addresses."""

    kind: str
    """What was made, such as 'rollouts' or 'checkpoint'."""
    inputs: dict[str, JsonValue]
    """Identity of what it was made from."""
    objects: dict[str, StoredObject]
    """The objects by role; a fork's may belong to its parent."""


class Ref(BaseModel, Generic[T]):
    """A reference to a committed artefact of type `T`: all that tasks pass to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Key
    """Key of the manifest."""
    sha256: Sha256
    """Digest of the manifest's bytes."""

    # The parameter is for type checkers. One class at run time: refs that were read from JSON or
    # passed through Prefect are equal to, and accepted as, those that a kind returned.
    @classmethod
    def __class_getitem__(cls, _: Any) -> type[Ref[Any]]:
        return cls


@dataclass(frozen=True)
class Committed(Generic[T]):
    """A committed artefact."""

    ref: Ref[T]
    manifest: Manifest
    """The manifest in the store: the first writer's."""
    diverged: bool = False
    """Whether this writer's objects differ from the committed ones, though its inputs do not."""


@dataclass(frozen=True)
class Artefact:
    """An opened artefact. Its objects are read and verified only when a method needs them."""

    store: Store
    manifest: Manifest

    @property
    def objects(self) -> dict[str, StoredObject]:
        """The stored objects by role."""
        return self.manifest.objects

    @property
    def inputs(self) -> dict[str, Any]:
        """Identity of what it was made from."""
        return self.manifest.inputs

    def files(self, role: str) -> list[StoredObject]:
        """Return the files that make up one of the objects, in order; none if it has none."""
        roles = sorted(name for name in self.objects if keys.whole_role(name) == role)
        return [self.objects[name] for name in roles]

    def document(self, role: str) -> dict[str, Any]:
        """Return one of the JSON objects."""
        return json.loads(self.store.get(self.objects[role]))


def commit(
    store: Store,
    key: str,
    *,
    kind: str,
    inputs: Mapping[str, Any],
    objects: Mapping[str, StoredObject],
) -> Committed[Any]:
    """Commit objects that are already written, or return the commit that came first.

    Args:
        store: The store.
        key: Key of the manifest.
        kind: What was made.
        inputs: Identity of what it was made from: JSON values and references.
        objects: The objects by role.

    Raises:
        ConflictingCommit: The key is committed with another kind or other inputs.
        CorruptObject: The manifest that came first is damaged.
        UnreadableData: Likewise.
    """
    manifest = Manifest(kind=kind, inputs=_plain(inputs), objects=dict(objects))
    data = manifest.to_bytes()
    if store.put_if_absent(key, data):
        return Committed(Ref(key=key, sha256=sha256_bytes(data)), manifest)
    first = _read(store, key)
    if first.manifest.kind != kind:
        shown = (json.dumps(first.manifest.kind), json.dumps(kind))
        raise ConflictingCommit(key, [Difference("kind", *shown)])
    _check_inputs(key, first.manifest, inputs)
    diverged = first.manifest.objects != manifest.objects
    return Committed(first.ref, first.manifest, diverged)


def find(
    store: Store, key: str, *, inputs: Mapping[str, Any] | None = None
) -> Committed[Any] | None:
    """Return the commit under a key; None if there is none.

    Args:
        store: The store.
        key: Key of the manifest.
        inputs: If given, what the commit must have been made from.

    Raises:
        ConflictingCommit: It was made from other inputs.
        CorruptObject: The manifest is damaged.
        UnreadableData: Likewise.
        UnknownSchema: Another release wrote it.
    """
    try:
        found = _read(store, key)
    except MissingObject:
        return None
    if inputs is not None:
        _check_inputs(key, found.manifest, inputs)
    return found


def load(store: Store, ref: Ref[Any]) -> Manifest:
    """Return the manifest that a reference names.

    Raises:
        MissingObject: It is missing.
        CorruptObject: Its bytes do not match the reference's digest.
        UnreadableData: The bytes are not a manifest.
        UnknownSchema: Another release wrote it.
    """
    data = store.read(ref.key)
    found = sha256_bytes(data)
    if found != ref.sha256:
        raise CorruptObject(ref.key, ref.sha256, found)
    return Manifest.from_bytes(ref.key, data)


def references(inputs: Any) -> Iterator[Ref[Any]]:
    """Yield every reference in a manifest's inputs, at any depth."""
    if isinstance(inputs, dict):
        if inputs.keys() == Ref.model_fields.keys():
            yield Ref.model_validate(inputs)
        else:
            for value in inputs.values():
                yield from references(value)
    elif isinstance(inputs, list):
        for value in inputs:
            yield from references(value)


def _read(store: Store, key: str) -> Committed[Any]:
    data = store.read(key)
    return Committed(Ref(key=key, sha256=sha256_bytes(data)), Manifest.from_bytes(key, data))


def _check_inputs(key: str, manifest: Manifest, inputs: Mapping[str, Any]) -> None:
    found = differences(manifest.inputs, _plain(inputs))
    if found:
        raise ConflictingCommit(key, found)


def _plain(inputs: Mapping[str, Any]) -> dict[str, JsonValue]:
    return json.loads(canonical_json(_dumped(inputs)))


def _dumped(value: Any) -> Any:
    """Replace references by their JSON, at any depth."""
    if isinstance(value, Ref):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {name: _dumped(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_dumped(part) for part in value]
    return value
