"""Making damaged parts of an epoch again, from what they were made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ddpo.basics.digests import sha256_bytes
from ddpo.errors import DdpoError
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.manifests import Ref
from ddpo.store.upkeep.scratch import ScratchStore
from ddpo.store.upkeep.verify import Damage
from ddpo_workflow.tasks.adopt import adopt_shard
from ddpo_workflow.tasks.credit import compute_credit
from ddpo_workflow.tasks.sample import draw_shard
from ddpo_workflow.tasks.score import score_rollouts

KINDS = ("rollouts", "rewards", "advantages")
"""What can be made again, each from those before it (and from the checkpoint)."""


@dataclass(frozen=True)
class Repair:
    """What became of one damaged part.

    Attributes:
        manifest: Key of the part's manifest.
        done: Whether its bytes are again those that were committed.
        said: Why not, otherwise.
    """

    manifest: str
    done: bool
    said: str = ""


def repair(run: Run, damages: Iterable[Damage]) -> list[Repair]:
    """Make again what is derivable: rollouts, their rewards, and advantages.

    Rollouts come from checkpoint and seed, rewards from rollouts, advantages from rewards. Equal
    numerics give equal bytes; where the bytes are others, that is said, and nothing is touched.

    Args:
        run: The run, of whose own reward the parts are.
        damages: What :func:`ddpo.store.upkeep.verify.verify_run` found.

    Returns:
        A repair a part, in the order they were made; other damages have none.
    """
    by_manifest: dict[str, list[Damage]] = {}
    for damage in damages:
        by_manifest.setdefault(damage.manifest, []).append(damage)
    parts = [(part, key) for key in by_manifest if (part := keys.parse_part_manifest(key))]
    parts.sort(key=lambda found: (KINDS.index(found[0][0]), found[1]))
    outcomes = []
    for (kind, epoch, shard), key in parts:
        try:
            _make_again(run, key, by_manifest[key], kind, epoch, shard or 0)
        except Exception as error:  # whatever it was, the other parts are still to be mended
            outcomes.append(Repair(key, False, f"{type(error).__name__}: {error}"))
        else:
            outcomes.append(Repair(key, True))
    return outcomes


class NotMended(DdpoError):
    """A part that cannot be made again here; nothing was touched."""


def _make_again(
    run: Run, manifest: str, damages: list[Damage], kind: str, epoch: int, shard: int
) -> None:
    reward_id = run.reward_id
    own = {
        "rollouts": keys.rollout_manifest_key(run.run_id, epoch, shard),
        "rewards": keys.reward_manifest_key(reward_id, run.run_id, epoch, shard),
        "advantages": keys.advantage_manifest_key(reward_id, run.run_id, epoch),
    }
    owner = keys.run_of(manifest)
    if owner != run.run_id:
        raise _belongs_to(owner)
    if manifest != own[kind]:
        raise NotMended("it belongs to another reward than this run's own")
    # In memory first: what is there, however damaged, is replaced by whole bytes or not at all.
    scratch = ScratchStore(run.store, [damage.key for damage in damages])
    aside = replace(run, store=scratch)
    fork = run.config.fork
    if kind == "rollouts" and fork and fork.adopts(epoch):
        if scratch.exists(manifest):  # what it lists is the other run's
            raise _belongs_to(fork.run_id)
        adopt_shard(aside, epoch, shard)
    elif kind == "rollouts":
        draw_shard(aside, _made_with(aside, manifest, epoch), epoch, shard)
    elif kind == "rewards":
        score_rollouts(aside, _rollouts(aside, epoch, shard), epoch, shard)
    else:
        shards = range(run.shards)
        rollouts = [_rollouts(aside, epoch, number) for number in shards]
        rewards = [_rewards(aside, epoch, number) for number in shards]
        compute_credit(aside, _made_with(aside, manifest, epoch), rollouts, rewards, epoch)
    keys_of_damage = {damage.key for damage in damages}
    # A manifest that nothing refers to has no digest known; what it would list must be there, too.
    otherwise = any(
        key not in keys_of_damage and not run.store.exists(key) for key in scratch.written
    )
    for damage in damages:
        made = scratch.written.get(damage.key)
        wrong = (
            made is not None
            and _is_digest(damage.expected)
            and (sha256_bytes(made) != damage.expected)
        )
        if made is None or wrong or otherwise:
            raise NotMended(
                "it was made again with other bytes; use the kind of device and the versions that "
                f"made it: {run.numerics.device_name}, {run.numerics.versions}"
            )
    for damage in damages:
        run.store.replace(damage.key, scratch.written[damage.key])


def _is_digest(text: str) -> bool:
    return len(text) == 64


def _belongs_to(run_id: str | None) -> NotMended:
    return NotMended(
        f"it belongs to run {run_id!r}: `ddpo verify {run_id} --repair` makes it again"
    )


def _made_with(run: Run, manifest: str, epoch: int) -> Ref:
    """Return the checkpoint, or what else held the state, that a part was made from.

    Its manifest tells: a history that is shared in a comparison is drawn by one checkpoint wholly.
    """
    key = keys.checkpoint_manifest_key(run.run_id, epoch)
    if known := manifests.find(run.store, manifest):
        key = Ref.model_validate(known.manifest.inputs["checkpoint"]).key
    return _found(run, key)


def _rollouts(run: Run, epoch: int, shard: int) -> Ref:
    return _found(run, keys.rollout_manifest_key(run.run_id, epoch, shard))


def _rewards(run: Run, epoch: int, shard: int) -> Ref:
    reward_id = run.reward_id
    return _found(run, keys.reward_manifest_key(reward_id, run.run_id, epoch, shard))


def _found(run: Run, key: str) -> Ref:
    found = manifests.find(run.store, key)
    if found is None:
        raise NotMended(f"{key} is missing too, and this part is made from it")
    return found.ref
