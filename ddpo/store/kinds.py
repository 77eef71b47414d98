"""The kinds of artefacts: each one's name, partitions, objects and reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ddpo.errors import MissingObject, UnreadableData
from ddpo.store import keys, manifests
from ddpo.store.artefacts import (
    AdvantageTable,
    Champion,
    CheckpointImages,
    EpochCommit,
    Evaluation,
    EvaluationScores,
    EvaluationShard,
    GateDecision,
    RolloutShard,
    Scores,
)
from ddpo.store.checkpoints import TENSOR_ROLES, Checkpoint
from ddpo.store.keys import TENSORS_SUFFIX, Partition
from ddpo.store.manifests import Artefact, Committed, Manifest, Ref
from ddpo.store.objects import Objects, Store, StoredObject
from ddpo.store.statistics import Statistics

T = TypeVar("T", bound=Artefact)
A = TypeVar("A")

_OPTIONAL = ("shard", "reward_id", "images_id")


@dataclass(frozen=True)
class Role:
    """Where one of a kind's objects is stored."""

    folder: str
    """Top folder of the store."""
    suffix: str
    """File suffix with its dot."""
    name: str = "part"
    """File name in an epoch's folder; a shard's objects are named after the shard."""


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of artefact of type `T`."""

    name: str
    """The value of `Manifest.kind`."""
    tree: str
    """Folder of its manifests."""
    partitions: frozenset[str]
    """Which of a partition's optional fields it has: 'shard', 'reward_id', 'images_id'."""
    roles: Mapping[str, Role]
    """Where its objects are stored, by role."""
    read: Callable[[Store, Manifest], T]
    """Opens a manifest."""

    def key(self, where: Partition) -> str:
        """Return the key of the manifest of a partition."""
        return keys.manifest_key(self.tree, self._checked(where))

    def parse(self, key: str) -> Partition | None:
        """Return the partition of a manifest of this kind; None for other keys."""
        tree, where = keys.parse_manifest(key) or ("", None)
        return where if tree == self.tree else None

    def partition(self, ref: Ref[T]) -> Partition:
        """Return the partition that a reference names.

        Raises:
            UnreadableData: It is of another kind.
        """
        where = self.parse(ref.key)
        if where is None:
            raise UnreadableData(ref.key, f"it is not the key of {self.name}")
        return where

    def stem(self, role: str, where: Partition) -> str:
        """Return the stem of one of its objects."""
        described, part = self._described(role)
        return keys.object_stem(described.folder, self._checked(where), described.name + part)

    def data_folder(self, role: str, run_id: str) -> str:
        """Return the folder of a run's objects of a role; only for kinds without a reward."""
        return f"{self.roles[role].folder}/{keys.run_folder(run_id)}"

    def partitions_of(
        self,
        store: Store,
        run_id: str | None = None,
        epoch: int | None = None,
        reward_id: str | None = None,
    ) -> list[Partition]:
        """Return the committed partitions of this kind, filtered as given, in the order of keys."""
        folder = keys.manifest_folder(
            self.tree, run_id, epoch, reward_id, by_set=bool(self.partitions - {"shard"})
        )
        found = (self.parse(key) for key in store.list(folder))
        wanted = {"run_id": run_id, "epoch": epoch, "reward_id": reward_id}
        return [
            where
            for where in found
            if where and all(v in (None, getattr(where, name)) for name, v in wanted.items())
        ]

    def find_all(
        self, store: Store, run_id: str, epoch: int, reward_id: str | None = None
    ) -> list[Ref[T]]:
        """Return what is committed of an epoch, even if incomplete, with shards in order."""
        found = self.partitions_of(store, run_id, epoch, reward_id)
        refs = (self.find(store, where) for where in found)
        return [ref for ref in refs if ref is not None]

    def exists(self, store: Store, where: Partition) -> bool:
        """Return whether a partition is committed."""
        return store.exists(self.key(where))

    def commit_of(
        self, store: Store, where: Partition, inputs: Mapping[str, Any] | None = None
    ) -> Committed[T] | None:
        """Return the commit of a partition; None if there is none.

        Args:
            store: The store.
            where: The partition.
            inputs: If given, the inputs that it must have been made from.

        Raises:
            ConflictingCommit: It was made from other inputs.
            UnreadableData: The manifest is of another kind, or damaged.
        """
        key = self.key(where)
        found = manifests.find(store, key, inputs=inputs)
        if found is not None:
            self._check(key, found.manifest)
        return found

    def find(
        self, store: Store, where: Partition, inputs: Mapping[str, Any] | None = None
    ) -> Ref[T] | None:
        """Return a reference to a partition's artefact; None if not committed. See `commit_of`."""
        found = self.commit_of(store, where, inputs)
        return None if found is None else found.ref

    def require_ref(self, store: Store, where: Partition) -> Ref[T]:
        """Return a reference to a partition's artefact, which must be committed.

        Raises:
            MissingObject: It is not committed.
        """
        ref = self.find(store, where)
        if ref is None:
            raise MissingObject(self.key(where), store.root)
        return ref

    def get(self, store: Store, where: Partition) -> T | None:
        """Open a partition's artefact; None if it is not committed."""
        found = self.commit_of(store, where)
        return None if found is None else self.read(store, found.manifest)

    def require(self, store: Store, where: Partition) -> T:
        """Open a partition's artefact, which must be committed.

        Raises:
            MissingObject: It is not committed.
        """
        artefact = self.get(store, where)
        if artefact is None:
            raise MissingObject(self.key(where), store.root)
        return artefact

    def load(self, store: Store, ref: Ref[T]) -> T:
        """Open the artefact that a reference names.

        Raises:
            MissingObject: It is missing.
            CorruptObject: Its manifest does not match the reference's digest.
            UnreadableData: The manifest is of another kind, or damaged.
        """
        manifest = manifests.load(store, ref)
        self._check(ref.key, manifest)
        return self.read(store, manifest)

    def commit(
        self, store: Store, where: Partition, inputs: Mapping[str, Any], objects: Objects
    ) -> Committed[T]:
        """Write the objects that are not stored yet, then commit all objects.

        Args:
            store: The store.
            where: The partition.
            inputs: What the artefact was made from: JSON values and references.
            objects: The objects by role.

        Returns:
            The commit; if another writer came first, that writer's.

        Raises:
            ConflictingCommit: The partition is committed from other inputs.
        """
        stored = {
            role: data
            if isinstance(data, StoredObject)
            else store.put(self.stem(role, where), self._described(role)[0].suffix, data)
            for role, data in objects.items()
        }
        return manifests.commit(
            store, self.key(where), kind=self.name, inputs=inputs, objects=stored
        )

    def _described(self, role: str) -> tuple[Role, str]:
        """Return an object's role, and what sets this file of it apart from the others."""
        whole = keys.whole_role(role)
        return self.roles[whole], role.removeprefix(whole)

    def _check(self, key: str, manifest: Manifest) -> None:
        if manifest.kind != self.name:
            raise UnreadableData(key, f"it commits {manifest.kind!r}, expected {self.name!r}")

    def _checked(self, where: Partition) -> Partition:
        given = {name for name in _OPTIONAL if getattr(where, name) is not None}
        if given != self.partitions:
            raise ValueError(
                f"{where} names {sorted(given) or 'nothing'} beside run and epoch; {self.name} "
                f"have {sorted(self.partitions) or 'nothing'}"
            )
        return where


def committed(
    store: Store,
    kind: Kind[T],
    where: Partition,
    inputs: Mapping[str, Any],
    make: Callable[[], Objects],
) -> Ref[T]:
    """Return a partition's artefact; make and commit it if it is not committed yet.

    Args:
        store: The store.
        kind: The kind of artefact.
        where: The partition.
        inputs: What the artefact is made from: JSON values and references.
        make: Returns its objects by role; called only if nothing is committed.

    Raises:
        ConflictingCommit: The partition is committed from other inputs.
    """
    found = kind.find(store, where, inputs)
    return found or kind.commit(store, where, inputs, make()).ref


ROLLOUTS: Kind[RolloutShard] = Kind(
    "rollouts",
    "rollouts",
    frozenset({"shard"}),
    {
        "rollouts": Role("rollouts", ".parquet"),
        "samples": Role("samples", ".parquet"),
        "trajectories": Role("trajectories", TENSORS_SUFFIX),
    },
    RolloutShard,
)
"""A shard of an epoch's samples: tables with and without the images, and trajectories."""

SCORES: Kind[Scores] = Kind(
    "rewards",
    "rewards",
    frozenset({"shard", "reward_id"}),
    {"rewards": Role("rewards", ".parquet")},
    Scores,
)
"""A shard's scores under a reward."""

ADVANTAGES: Kind[AdvantageTable] = Kind(
    "advantages",
    "advantages",
    frozenset({"reward_id"}),
    {
        "advantages": Role("advantages", ".parquet"),
        # Kept apart: readers that glob the advantages folder expect Parquet files only.
        "statistics": Role("statistics", ".json"),
    },
    AdvantageTable,
)
"""An epoch's advantages under a reward, and the prompt statistics after it."""

STATISTICS: Kind[Statistics] = Kind(
    "statistics",
    "statistics",
    frozenset({"reward_id"}),
    {"statistics": Role("statistics", ".json")},
    Statistics,
)
"""Prompt statistics after an epoch, rebuilt from scores without advantages."""

CHECKPOINT: Kind[Checkpoint] = Kind(
    "checkpoint",
    "checkpoints",
    frozenset(),
    {
        **{role: Role("checkpoints", TENSORS_SUFFIX, role) for role in TENSOR_ROLES},
        **{role: Role("checkpoints", ".json", role) for role in ("progress", "digests", "metrics")},
    },
    Checkpoint,
)
"""The state before an epoch."""

IMAGES: Kind[CheckpointImages] = Kind(
    "pictures",
    "pictures",
    frozenset({"images_id"}),
    {"pictures": Role("pictures", ".parquet")},
    CheckpointImages,
)
"""A checkpoint's images of fixed prompts and seeds."""

EVALUATION_SHARD: Kind[EvaluationShard] = Kind(
    "evaluation samples",
    "evaluations/samples",
    frozenset({"images_id", "shard"}),
    {
        "samples": Role("evaluations/samples", ".parquet"),
        "divergence": Role("evaluations/divergences", ".json"),
    },
    EvaluationShard,
)
"""A part of the images that a checkpoint is evaluated on."""

EVALUATION_SCORES: Kind[EvaluationScores] = Kind(
    "evaluation scores",
    "evaluations/rewards",
    frozenset({"reward_id", "images_id", "shard"}),
    {"rewards": Role("evaluations/rewards", ".parquet")},
    EvaluationScores,
)
"""The scores of such a part under one reward."""

EVALUATION: Kind[Evaluation] = Kind(
    "evaluation",
    "evaluations/summaries",
    frozenset({"images_id"}),
    {
        "images": Role("evaluations/images", ".parquet"),
        "metrics": Role("evaluations/metrics", ".json"),
    },
    Evaluation,
)
"""A checkpoint's evaluation: a row per image, and a summary."""

GATE_DECISION: Kind[GateDecision] = Kind(
    "gate decision",
    "evaluations/decisions",
    frozenset({"images_id"}),
    {"decision": Role("evaluations/decisions", ".json")},
    GateDecision,
)
"""The decision of a run's gate to end training, after a checkpoint's evaluation."""

CHAMPION: Kind[Champion] = Kind(
    "champion",
    "evaluations/champions",
    frozenset({"images_id"}),
    {"champion": Role("evaluations/champions", ".json")},
    Champion,
)
"""The best evaluated checkpoint; the partition names the latest one that it was chosen from."""

EPOCH: Kind[EpochCommit] = Kind("epoch", "epochs", frozenset(), {}, EpochCommit)
"""The commit of an epoch."""

KINDS: tuple[Kind[Any], ...] = (
    ROLLOUTS,
    SCORES,
    ADVANTAGES,
    STATISTICS,
    CHECKPOINT,
    IMAGES,
    EVALUATION_SHARD,
    EVALUATION_SCORES,
    EVALUATION,
    GATE_DECISION,
    CHAMPION,
    EPOCH,
)


def open_ref(store: Store, ref: Ref[A]) -> A:
    """Open the artefact that a reference names, whatever its kind.

    Raises:
        UnreadableData: The manifest is of no known kind.
    """
    manifest = manifests.load(store, ref)
    for kind in KINDS:
        if kind.name == manifest.kind:
            return kind.read(store, manifest)
    raise UnreadableData(ref.key, f"its kind {manifest.kind!r} is unknown to this version of ddpo")
