"""Verification: reads everything that a run committed, and says what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddpo.errors import CorruptObject, MissingObject, StoreCallFailed, StoreError
from ddpo.store import keys, manifests, runs
from ddpo.store.manifests import Manifest
from ddpo.store.objects import Store

NOTHING = "nothing"
"""Stands for the digest of an object that is not there."""


@dataclass(frozen=True)
class Damage:
    """Something that is not what was committed.

    Attributes:
        key: Of the object, manifest or record.
        manifest: Key of the manifest that lists the object; the key itself for a document.
        expected: sha256 of what should be there, or what it should be.
        found: sha256 of what is there, `NOTHING`, or why it cannot be read.
    """

    key: str
    manifest: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Verification:
    """The outcome of verifying a run.

    Attributes:
        objects: How many were read and compared, documents included.
        bytes: How many bytes that were.
        retired: Objects that retention deleted on purpose.
        damages: What is damaged, sorted by key.
    """

    objects: int
    bytes: int
    retired: int
    damages: tuple[Damage, ...]


def verify_run(
    store: Store, run_id: str, on_object: Callable[[str], None] = lambda key: None
) -> Verification:
    """Read all records, manifests and objects of a run, and compare every reference.

    What nothing refers to cannot be missed when it is gone: the newest epoch's commit, the newest
    checkpoint, and pictures.

    Args:
        store: The store.
        run_id: The run.
        on_object: Called with each key before it is read.

    Returns:
        What was read, and what is damaged.

    Raises:
        RunNotFound: The store has no such run.
    """
    verifier = _Verifier(store, run_id, on_object)
    verifier.records()
    present = run_manifests(store, run_id)
    for key in present:
        verifier.manifest(key)
    verifier.gaps(present)
    # Where both are known, the digest that another manifest names tells more.
    damages = {damage.key: damage for damage in [*verifier.unreadable, *verifier.damages]}
    return Verification(
        objects=len(verifier.seen),
        bytes=verifier.bytes,
        retired=verifier.retired,
        damages=tuple(damages[key] for key in sorted(damages)),
    )


def run_manifests(store: Store, run_id: str) -> list[str]:
    """List the keys of a run's manifests, sorted."""
    part = f"run_id={keys.validate_run_id(run_id)}"
    return [key for key in store.list("manifests") if part in key.split("/")]


class _Verifier:
    def __init__(self, store: Store, run_id: str, on_object: Callable[[str], None]) -> None:
        self.store = store
        self.run_id = run_id
        self.on_object = on_object
        self.seen: dict[str, str] = {}
        """Digest of what was found under each key that was read."""
        self.bytes = 0
        self.retired = 0
        self.is_fork = False
        self.damages: list[Damage] = []
        self.unreadable: list[Damage] = []

    def records(self) -> None:
        """Read the run's record, and those of its starts."""
        key = keys.run_key(self.run_id)
        if not self.store.exists(key):
            runs.load_run(self.store, self.run_id)  # raises, naming the nearest
        record = self._document(key, lambda: runs.load_run(self.store, self.run_id))
        self.is_fork = record is not None and "fork" in record.identity
        self._document(
            keys.starts_prefix(self.run_id),
            lambda: runs.list_operations(self.store, self.run_id),
        )

    def manifest(self, key: str) -> None:
        """Read a manifest, all that it lists, and all manifests that it was made from."""
        manifest = self._document(key, lambda: _whole(self.store, key))
        if manifest is None:
            return
        for ref in manifests.references(manifest.inputs):
            found = self._digest(ref.key)
            if found != ref.sha256:
                self.damages.append(Damage(ref.key, ref.key, ref.sha256, found))
        for stored in manifest.objects.values():
            found = self._digest(stored.key)
            if found == NOTHING and self._is_retired(stored.key):
                self.retired += 1
            elif found != stored.sha256:
                self.damages.append(Damage(stored.key, key, stored.sha256, found))

    def gaps(self, present: list[str]) -> None:
        """Find commits that must have been there: those before a later one."""
        checkpoints, epochs = (
            {int(key[-10:-5]) for key in present if key.startswith(f"manifests/{kind}/")}
            for kind in ("checkpoints", "epochs")
        )
        # Checkpoint k + 1 comes before the commit of epoch k, and that before checkpoint k + 2.
        last = max([*epochs, *(epoch - 2 for epoch in checkpoints)], default=-1)
        # A fork's first checkpoint has the number of the epoch at which it branches off.
        first = min([*epochs, *checkpoints], default=0) if self.is_fork else 0
        wanted = [keys.epoch_manifest_key(self.run_id, epoch) for epoch in range(first, last + 1)]
        wanted += [
            keys.checkpoint_manifest_key(self.run_id, epoch)
            for epoch in range(first, max(checkpoints, default=-1))
        ]
        starts = self.store.list(keys.starts_prefix(self.run_id))
        wanted += [keys.start_key(self.run_id, number) for number in range(1, len(starts) + 1)]
        for key in sorted({*wanted} - {*present} - {*starts}):
            self.unreadable.append(Damage(key, key, "a readable document", NOTHING))

    def _is_retired(self, key: str) -> bool:
        record = keys.retirement_of(key)
        return record is not None and self.store.exists(record)

    def _document(self, key: str, read: Callable[[], Any]) -> Any:
        self.on_object(key)
        try:
            found = read()
        except CorruptObject as error:
            said = f"one with checksum {error.found}"
            self.unreadable.append(Damage(error.key, key, f"checksum {error.expected}", said))
        except StoreError as error:
            said = (
                NOTHING if isinstance(error, MissingObject) else f"{type(error).__name__}: {error}"
            )
            self.unreadable.append(Damage(key, key, "a readable document", said))
        else:
            self.seen.setdefault(key, "")
            return found
        return None

    def _digest(self, key: str) -> str:
        if not self.seen.get(key):
            self.on_object(key)
            try:
                self.seen[key] = self.store.digest(key)
            except MissingObject:
                return NOTHING
            except StoreCallFailed as error:  # a bad block, or a server that failed
                return error.reason
            self.bytes += self.store.size(key)
        return self.seen[key]


def _whole(store: Store, key: str) -> Manifest:
    found = manifests.find(store, key)
    if found is None:
        raise MissingObject(key, store.root)
    return found.manifest
