"""What a run's epochs committed, followed from their commits, manifest by manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ddpo.errors import MissingObject, RetiredObject, UnreadableData
from ddpo.store import keys, manifests
from ddpo.store.manifests import Manifest, Ref
from ddpo.store.objects import Store, StoredObject

_REWARD_NAME = re.compile(r"/reward_name=([^/]+)/")


@dataclass(frozen=True)
class Shard:
    """A committed shard of an epoch.

    Attributes:
        number: Its place in the epoch, from 0.
        ref: Its manifest.
        rollouts: Its table, a row a sample in the order of `sample_id`.
        trajectories: Its tensors, in the same order.
    """

    number: int
    ref: Ref
    rollouts: StoredObject
    trajectories: StoredObject


@dataclass(frozen=True)
class Epoch:
    """A committed epoch.

    Attributes:
        run_id: The run.
        epoch: The epoch.
        reward_id: The reward that it was trained on.
        shards: Its shards, in order.
        rewards: The manifests of their scores, in order.
        advantages: The manifest of its advantages.
    """

    run_id: str
    epoch: int
    reward_id: str
    shards: tuple[Shard, ...]
    rewards: tuple[Ref, ...]
    advantages: Ref

    def scores(self, store: Store, reward_id: str | None) -> Iterator[tuple[Shard, StoredObject]]:
        """Yield the shards that a reward has scored.

        Args:
            store: The store.
            reward_id: The reward; None for the one that the epoch was trained on.

        Yields:
            A shard, and the object with its scores.

        Raises:
            UnreadableData: What is committed as its scores is of other rollouts.
        """
        for shard in self.shards:
            if reward_id in (None, self.reward_id):
                manifest = manifests.load(store, self.rewards[shard.number])
            else:
                found = self._scores_by(store, str(reward_id), shard)
                if found is None:
                    continue
                manifest = found
            yield shard, manifest.objects["rewards"]

    def _scores_by(self, store: Store, reward_id: str, shard: Shard) -> Manifest | None:
        key = keys.reward_manifest_key(reward_id, self.run_id, self.epoch, shard.number)
        found = manifests.find(store, key)
        if found is None:
            return None
        if shard.ref not in manifests.references(found.manifest.inputs):
            raise UnreadableData(key, f"it scores other rollouts than those of {shard.ref.key}")
        return found.manifest

    def advantages_by(self, store: Store, reward_id: str | None) -> StoredObject | None:
        """Return the object with the advantages by a reward, None where there is none.

        Args:
            store: The store.
            reward_id: The reward; None for the one that the epoch was trained on.
        """
        if reward_id in (None, self.reward_id):
            return manifests.load(store, self.advantages).objects["advantages"]
        key = keys.advantage_manifest_key(str(reward_id), self.run_id, self.epoch)
        found = manifests.find(store, key)
        return found.manifest.objects["advantages"] if found else None

    def retirement(self, store: Store) -> RetiredObject | None:
        """Return what reading the samples would raise, if retention has deleted them."""
        record = keys.retirement_of(self.shards[0].rollouts.key)
        if record is None or not store.exists(record):
            return None
        # What another run refers to was recorded, and left where it is.
        needed = [shard.rollouts for shard in self.shards]
        needed += [stored for _, stored in self.scores(store, None)]
        gone = next((stored.key for stored in needed if not store.exists(stored.key)), None)
        return RetiredObject(gone, store.root, record) if gone else None


def committed_epochs(store: Store, run_id: str) -> list[int]:
    """List the epochs of a run that are committed, retired ones too, sorted."""
    # Commits are found by listing, since a run may lack its first, or one that is to be made anew;
    # data never is.
    found = store.list(keys.epoch_manifests_prefix(run_id))
    return [epoch for key in found if (epoch := keys.parse_epoch(key)) is not None]


def read_epoch(store: Store, run_id: str, epoch: int) -> Epoch:
    """Read an epoch's commit and the manifests of its shards.

    Args:
        store: The store.
        run_id: The run.
        epoch: The epoch.

    Returns:
        The epoch.

    Raises:
        MissingObject: It is not committed, or a manifest that its commit refers to is gone.
        CorruptObject: One of them is damaged.
        UnreadableData: Likewise.
    """
    key = keys.epoch_manifest_key(run_id, epoch)
    committed = manifests.find(store, key)
    if committed is None:
        raise MissingObject(key, store.root)
    inputs: Any = committed.manifest.inputs
    try:
        rollouts = [Ref.model_validate(ref) for ref in inputs["rollouts"]]
        rewards = [Ref.model_validate(ref) for ref in inputs["rewards"]]
        advantages = Ref.model_validate(inputs["advantages"])
        (reward_id,) = _REWARD_NAME.findall(advantages.key)
        if not rollouts or len(rollouts) != len(rewards):
            raise ValueError(f"{len(rollouts)} shards and scores of {len(rewards)}")
        listed = [manifests.load(store, ref).objects for ref in rollouts]
        shards = tuple(
            Shard(number, ref, objects["rollouts"], objects["trajectories"])
            for number, (ref, objects) in enumerate(zip(rollouts, listed, strict=True))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableData(key, f"it is no commit of an epoch: {error}") from error
    return Epoch(run_id, epoch, reward_id, shards, tuple(rewards), advantages)


def reward_ids(store: Store, run_id: str) -> list[str]:
    """List the rewards that have scored samples of a run, sorted."""
    part = f"run_id={keys.validate_run_id(run_id)}"
    listed = [key.split("/") for key in store.list("manifests/rewards")]
    return sorted({key[2].removeprefix("reward_name=") for key in listed if part in key[3:4]})


def reward_of_digest(store: Store, digest: str) -> str | None:
    """Find a reward among all that have scored anything in a store.

    Args:
        store: The store.
        digest: Digest of its identity.

    Returns:
        Its id, in which its name stands; None if it has scored nothing.
    """
    names = [name.removeprefix("reward_name=") for name in store.folders("manifests/rewards")]
    return next((name for name in names if name.endswith(f"-{digest[:8]}")), None)
