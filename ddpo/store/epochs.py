"""A run's committed epochs, opened manifest by manifest from their commits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ddpo.errors import RetiredObject, UnreadableData
from ddpo.store import keys, manifests
from ddpo.store.artefacts import AdvantageTable, EpochCommit, RolloutShard, Scores
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, EPOCH, ROLLOUTS, SCORES
from ddpo.store.objects import Store


@dataclass(frozen=True)
class Epoch:
    """A committed epoch with its shards."""

    store: Store
    where: Partition
    """The run, the epoch, and the reward that it was trained on."""
    commit: EpochCommit
    """The commit."""
    shards: tuple[RolloutShard, ...]
    """Its shards, in order."""

    @property
    def reward_id(self) -> str:
        """The reward that the epoch was trained on."""
        return str(self.where.reward_id)

    def scores(self, reward_id: str | None) -> Iterator[tuple[RolloutShard, Scores]]:
        """Yield the shards that a reward has scored, each with its scores.

        Args:
            reward_id: The reward; None for the one that the epoch was trained on.

        Raises:
            UnreadableData: The committed scores belong to other rollouts.
        """
        for number, shard in enumerate(self.shards):
            if reward_id in (None, self.reward_id):
                yield shard, SCORES.load(self.store, self.commit.scores[number])
                continue
            where = self._by(str(reward_id), number)
            scores = SCORES.get(self.store, where)
            if scores is None:
                continue
            ref = self.commit.rollouts[number]
            if ref not in manifests.references(scores.inputs):
                reason = f"it scores other rollouts than those of {ref.key}"
                raise UnreadableData(SCORES.key(where), reason)
            yield shard, scores

    def advantages_by(self, reward_id: str | None) -> AdvantageTable | None:
        """Return the advantages under a reward, None if there are none.

        Args:
            reward_id: The reward; None for the one that the epoch was trained on.
        """
        if reward_id in (None, self.reward_id):
            return ADVANTAGES.load(self.store, self.commit.advantages)
        return ADVANTAGES.get(self.store, self._by(str(reward_id)))

    def retirement(self) -> RetiredObject | None:
        """Return the error of reading the samples if retention has deleted them, else None."""
        record = keys.retirement_of(self.shards[0].objects["rollouts"].key)
        if record is None or not self.store.exists(record):
            return None
        roles = ("rollouts", "samples")
        # Objects that another run refers to are kept despite the record.
        needed = [shard.objects[role].key for shard in self.shards for role in roles]
        needed += [scores.objects["rewards"].key for _, scores in self.scores(None)]
        gone = next((key for key in needed if not self.store.exists(key)), None)
        return RetiredObject(gone, self.store.root, record) if gone else None

    def _by(self, reward_id: str, shard: int | None = None) -> Partition:
        return Partition(self.where.run_id, self.where.epoch, shard, reward_id)


def committed_epochs(store: Store, run_id: str) -> list[int]:
    """Return the epochs of a run that are committed, retired ones too, sorted."""
    # By listing: a run may lack its first commit, or one that was deleted to be recomputed.
    return [where.epoch for where in EPOCH.partitions_of(store, run_id)]


def read_epoch(store: Store, run_id: str, epoch: int) -> Epoch:
    """Open an epoch's commit and the manifests of its shards.

    Raises:
        MissingObject: The epoch is not committed, or a manifest that it refers to is missing.
        CorruptObject: One of these manifests is damaged.
        UnreadableData: Likewise.
    """
    where = Partition(run_id, epoch)
    commit = EPOCH.require(store, where)
    try:
        if not commit.rollouts or len(commit.rollouts) != len(commit.scores):
            raise ValueError(f"{len(commit.rollouts)} shards and scores of {len(commit.scores)}")
        trained = ADVANTAGES.parse(commit.advantages.key)
        if trained is None:
            raise ValueError(f"{commit.advantages.key} is not a manifest of advantages")
        shards = tuple(ROLLOUTS.load(store, ref) for ref in commit.rollouts)
        if missing := [s for s in shards if not ROLLOUTS.roles.keys() <= s.objects.keys()]:
            raise ValueError(f"a shard with {sorted(missing[0].objects)} alone")
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableData(EPOCH.key(where), f"not a commit of an epoch: {error}") from error
    return Epoch(store, Partition(run_id, epoch, reward_id=trained.reward_id), commit, shards)


def reward_ids(store: Store, run_id: str) -> list[str]:
    """Return the rewards that have scored samples of a run, sorted."""
    return sorted({str(where.reward_id) for where in SCORES.partitions_of(store, run_id)})
