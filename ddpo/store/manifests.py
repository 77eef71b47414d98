"""Manifests: what makes objects committed.

A manifest is created last and exclusively. The first one wins; a later writer of the same inputs
adopts it, a writer of other inputs fails by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from ddpo.basics.digests import canonical_json, sha256_bytes
from ddpo.errors import ConflictingCommit, CorruptObject, MissingObject, UnreadableData
from ddpo.store.documents import Difference, differences, seal, unseal
from ddpo.store.objects import Key, Sha256, Store, StoredObject

SCHEMA_VERSION = 1


class Manifest(BaseModel):
    """What was made, from what, and where it lies. Holds no times, hosts or addresses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""
    kind: str
    """What was made, such as 'rollouts' or 'checkpoint'."""
    inputs: dict[str, JsonValue]
    """Identity of what it was made from."""
    objects: dict[str, StoredObject]
    """The objects, by role; they may belong to another run (a fork's do)."""

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON that is committed, with its checksum."""
        return seal(self.model_dump(mode="json"))


class Ref(BaseModel):
    """A reference to a committed manifest: all that tasks pass to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Key
    """Key of the manifest."""
    sha256: Sha256
    """Digest of the manifest's bytes."""


@dataclass(frozen=True)
class Committed:
    """The outcome of a commit, or of looking for one."""

    ref: Ref
    manifest: Manifest
    """The manifest in the store: the first writer's."""
    adopted: bool
    """Whether the manifest was there before this call."""
    diverged: bool
    """Whether this caller's objects differ from the committed ones, though its inputs do not."""


def commit(
    store: Store,
    key: str,
    *,
    kind: str,
    inputs: Mapping[str, Any],
    objects: Mapping[str, StoredObject],
) -> Committed:
    """Commits objects that are already written, or adopts the commit that came first.

    Args:
        store: The store.
        key: Key of the manifest.
        kind: What was made.
        inputs: Identity of what it was made from, as JSON values.
        objects: The objects by role.

    Returns:
        The committed manifest, which is another writer's if `adopted`.

    Raises:
        ConflictingCommit: The key is committed with another kind or other inputs.
        CorruptObject: The manifest that came first is damaged.
        UnreadableData: Likewise.
    """
    manifest = Manifest(kind=kind, inputs=_plain(inputs), objects=dict(objects))
    data = manifest.to_bytes()
    if store.put_if_absent(key, data):
        ref = Ref(key=key, sha256=sha256_bytes(data))
        return Committed(ref, manifest, adopted=False, diverged=False)
    first = _read(store, key)
    if first.manifest.kind != kind:
        shown = (json.dumps(first.manifest.kind), json.dumps(kind))
        raise ConflictingCommit(key, [Difference("kind", *shown)])
    _check_inputs(key, first.manifest, inputs)
    diverged = first.manifest.objects != manifest.objects
    return Committed(first.ref, first.manifest, adopted=True, diverged=diverged)


def find(store: Store, key: str, *, inputs: Mapping[str, Any] | None = None) -> Committed | None:
    """Looks for the commit under a key.

    Args:
        store: The store.
        key: Key of the manifest.
        inputs: If given, what the commit must have been made from.

    Returns:
        The commit, None where there is none.

    Raises:
        ConflictingCommit: It was made from other inputs.
        CorruptObject: The manifest is damaged.
        UnreadableData: Likewise.
        UnknownSchema: It is of another release.
    """
    try:
        found = _read(store, key)
    except MissingObject:
        return None
    if inputs is not None:
        _check_inputs(key, found.manifest, inputs)
    return found


def load(store: Store, ref: Ref) -> Manifest:
    """Reads the manifest that a reference names.

    Args:
        store: The store.
        ref: The reference.

    Returns:
        The manifest, whose bytes are those of the reference.

    Raises:
        MissingObject: It is not there.
        CorruptObject: Its bytes are not those of the reference.
        UnreadableData: They are no manifest.
        UnknownSchema: It is of another release.
    """
    data = store.read(ref.key)
    found = sha256_bytes(data)
    if found != ref.sha256:
        raise CorruptObject(ref.key, ref.sha256, found)
    return _parse(ref.key, data)


def references(inputs: Any) -> Iterator[Ref]:
    """Yield every reference to a manifest that stands in a manifest's inputs, at any depth."""
    if isinstance(inputs, dict):
        if inputs.keys() == Ref.model_fields.keys():
            yield Ref.model_validate(inputs)
        else:
            for value in inputs.values():
                yield from references(value)
    elif isinstance(inputs, list):
        for value in inputs:
            yield from references(value)


def _read(store: Store, key: str) -> Committed:
    data = store.read(key)
    ref = Ref(key=key, sha256=sha256_bytes(data))
    return Committed(ref, _parse(key, data), adopted=True, diverged=False)


def _parse(key: str, data: bytes) -> Manifest:
    document = unseal(key, data, schema_version=SCHEMA_VERSION)
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise UnreadableData(key, str(error)) from error


def _check_inputs(key: str, manifest: Manifest, inputs: Mapping[str, Any]) -> None:
    found = differences(manifest.inputs, _plain(inputs))
    if found:
        raise ConflictingCommit(key, found)


def _plain(inputs: Mapping[str, Any]) -> dict[str, JsonValue]:
    return json.loads(canonical_json(inputs))
