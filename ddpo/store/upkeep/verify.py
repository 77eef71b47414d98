"""Verification: read everything that a run committed, and report what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddpo.errors import CorruptObject, MissingObject, StoreCallFailed, StoreError
from ddpo.store import keys, manifests, runs
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, EPOCH, ROLLOUTS, SCORES, Kind
from ddpo.store.manifests import Manifest
from ddpo.store.objects import Store

NOTHING = "nothing"
"""Stands for the digest of a missing object."""


REPAIRABLE: tuple[Kind[Any], ...] = (ROLLOUTS, SCORES, ADVANTAGES)
"""Kinds that can be rebuilt, each from those before it and from the checkpoint."""


@dataclass(frozen=True)
class Damage:
    """An object or document that differs from what was committed, or is missing."""

    key: str
    """Key of the object, manifest or record."""
    manifest: str
    """Key of the manifest that lists the object; the key itself for a document."""
    expected: str
    """Expected sha256, or a description of what is expected."""
    found: str
    """Actual sha256, `NOTHING`, or why it cannot be read."""

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, found {self.found}"


def repairable_part(manifest: str) -> tuple[Kind[Any], Partition] | None:
    """Return the kind and the partition of a repairable part's manifest; None for other keys."""
    for kind in REPAIRABLE:
        if where := kind.parse(manifest):
            return kind, where
    return None


@dataclass(frozen=True)
class Verification:
    """The outcome of verifying a run."""

    objects: int
    """Number of objects read and compared, including documents."""
    bytes: int
    """Number of bytes read."""
    epochs: int
    """Number of committed epochs that were found."""
    retired: int
    """Number of objects that retention deleted on purpose."""
    damages: tuple[Damage, ...]
    """What is damaged, sorted by key."""


def verify_run(
    store: Store, run_id: str, on_object: Callable[[str], None] = lambda key: None
) -> Verification:
    """Read all records, manifests and objects of a run, and compare every reference.

    Deletion of what nothing refers to is not detected: the newest epoch's commit, the newest
    checkpoint, and images of fixed prompts.

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
    # If both are known, the digest named by another manifest is more informative.
    damages = {damage.key: damage for damage in [*verifier.unreadable, *verifier.damages]}
    return Verification(
        objects=len(verifier.seen),
        bytes=verifier.bytes,
        epochs=sum(EPOCH.parse(key) is not None for key in present),
        retired=verifier.retired,
        damages=tuple(damages[key] for key in sorted(damages)),
    )


def run_manifests(store: Store, run_id: str) -> list[str]:
    """List the keys of a run's manifests, sorted."""
    return [key for key in store.list(keys.MANIFESTS) if keys.belongs_to(key, run_id)]


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
        """Read the records of the run and its starts."""
        key = keys.run_key(self.run_id)
        if not self.store.exists(key):
            runs.load_run(self.store, self.run_id)  # raises, with similar names
        record = self._document(key, lambda: runs.load_run(self.store, self.run_id))
        self.is_fork = record is not None and "fork" in record.identity
        self._document(
            keys.starts_prefix(self.run_id),
            lambda: runs.list_operations(self.store, self.run_id),
        )

    def manifest(self, key: str) -> None:
        """Read a manifest, the objects that it lists, and the manifests it was made from."""
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
        """Find missing commits that must have existed, since there are later ones."""
        checkpoints, epochs = (
            {where.epoch for key in present if (where := kind.parse(key))}
            for kind in (CHECKPOINT, EPOCH)
        )
        # Checkpoint k + 1 comes before the commit of epoch k, and that before checkpoint k + 2.
        last = max([*epochs, *(epoch - 2 for epoch in checkpoints)], default=-1)
        # A fork's first checkpoint has the number of the epoch at which it forks.
        first = min([*epochs, *checkpoints], default=0) if self.is_fork else 0
        wanted = [EPOCH.key(Partition(self.run_id, epoch)) for epoch in range(first, last + 1)]
        wanted += [
            CHECKPOINT.key(Partition(self.run_id, epoch))
            for epoch in range(first, max(checkpoints, default=-1))
        ]
        starts = self.store.list(keys.starts_prefix(self.run_id))
        found = [start[1] for key in starts if (start := keys.start_of_record(key))]
        last = max(found, default=0)
        wanted += [keys.start_key(self.run_id, number) for number in range(1, last + 1)]
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
