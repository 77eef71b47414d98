"""Making damaged parts of an epoch again, from what they were made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ddpo.errors import DdpoError
from ddpo.run import Run
from ddpo.store import keys, manifests
from ddpo.store.manifests import Committed, Ref
from ddpo.store.verify import Damage
from tasks.advantages import normalise
from tasks.sample import draw_shard
from tasks.score import score_rollouts

KINDS = ("rollouts", "rewards", "advantages")
"""What can be made again, each from those before it (and from the checkpoint)."""


@dataclass(frozen=True)
class Repair:
    """What became of one damaged part.

    Attributes:
        manifest: Key of the part's manifest.
        done: Whether it was made again, with objects of the bytes that its manifest lists.
        said: Why not, otherwise.
    """

    manifest: str
    done: bool
    said: str = ""


def repair(run: Run, damages: Iterable[Damage]) -> list[Repair]:
    """Make again what is derivable: rollouts, their rewards, and advantages.

    Rollouts come from checkpoint and seed, rewards from rollouts, advantages from rewards. Equal
    numerics give equal bytes; where the bytes are others, that is said, and they are not kept.

    Args:
        run: The run, of whose own reward the parts are.
        damages: What :func:`ddpo.store.verify.verify_run` found.

    Returns:
        A repair a part, in the order they were made; other damages have none. Verify once more: a
        manifest that was made anew may differ from the one that an epoch's commit names.
    """
    by_manifest: dict[str, list[Damage]] = {}
    for damage in damages:
        by_manifest.setdefault(damage.manifest, []).append(damage)
    parts = [(part, key) for key in by_manifest if (part := keys.parse_part_manifest(key))]
    parts.sort(key=lambda found: (KINDS.index(found[0][0]), found[1]))
    return [
        _make_again(run, key, by_manifest[key], kind, epoch, shard)
        for (kind, epoch, shard), key in parts
    ]


def _make_again(
    run: Run, manifest: str, damages: list[Damage], kind: str, epoch: int, shard: int | None
) -> Repair:
    makers: dict[str, Callable[[], Committed]] = {
        "rollouts": lambda: draw_shard(run, _checkpoint(run, epoch), epoch, shard or 0),
        "rewards": lambda: score_rollouts(
            run, _rollouts(run, epoch, shard or 0), epoch, shard or 0
        ),
        "advantages": lambda: normalise(
            run,
            _checkpoint(run, epoch),
            [_rollouts(run, epoch, number) for number in range(run.shards)],
            [_rewards(run, epoch, number) for number in range(run.shards)],
            epoch,
        ),
    }
    for damage in damages:
        run.store.delete(damage.key)
    try:
        made = makers[kind]()
    except DdpoError as error:
        return Repair(manifest, False, str(error))
    if made.diverged:
        return Repair(
            manifest,
            False,
            "it was made again with other bytes; use the kind of device and the versions that "
            f"made it: {run.numerics.device_name}, {run.numerics.versions}",
        )
    return Repair(manifest, True)


def _checkpoint(run: Run, epoch: int) -> Ref:
    return _found(run, keys.checkpoint_manifest_key(run.run_id, epoch))


def _rollouts(run: Run, epoch: int, shard: int) -> Ref:
    return _found(run, keys.rollout_manifest_key(run.run_id, epoch, shard))


def _rewards(run: Run, epoch: int, shard: int) -> Ref:
    reward_id = run.reward.identity.reward_id
    return _found(run, keys.reward_manifest_key(reward_id, run.run_id, epoch, shard))


def _found(run: Run, key: str) -> Ref:
    found = manifests.find(run.store, key)
    if found is None:
        raise DdpoError(f"{key} is missing too, and this part is made from it")
    return found.ref
