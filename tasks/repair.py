"""Rebuild damaged parts of an epoch from what they were made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ddpo.basics.digests import sha256_bytes
from ddpo.errors import DdpoError, NotTrusted
from ddpo.runs import Run
from ddpo.store.artefacts import RolloutShard, Scores
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, ROLLOUTS, SCORES, Kind
from ddpo.store.manifests import Committed, Ref, find
from ddpo.store.upkeep.scratch import ScratchStore
from ddpo.store.upkeep.verify import REPAIRABLE, Damage, repairable_part
from ddpo_workflow.tasks.credit import committed_credit
from ddpo_workflow.tasks.inherit import inherit_shard
from ddpo_workflow.tasks.sample import shard_of
from ddpo_workflow.tasks.score import scores_of


@dataclass(frozen=True)
class Repair:
    """The outcome of repairing one damaged part."""

    manifest: str
    """Key of the part's manifest."""
    done: bool
    """Whether the committed bytes are restored."""
    reason: str = ""
    """Why not; empty if done."""


class NotRepaired(DdpoError):
    """A part cannot be rebuilt here; nothing was changed."""


def repair(run: Run, damages: Iterable[Damage]) -> list[Repair]:
    """Rebuild damaged rollouts, scores and advantages.

    Rollouts are rebuilt from checkpoint and seed, scores from rollouts, advantages from scores.
    Equal numerics give equal bytes; if the bytes differ, the reason says so and nothing is changed.

    Args:
        run: The run, under its own reward.
        damages: What :func:`ddpo.store.upkeep.verify.verify_run` found.

    Returns:
        One outcome per part, in the order of rebuilding; damage of other kinds has none.

    Raises:
        NotTrusted: Rebuilding a part needs the run's own code, and the run is not trusted here.
    """
    run.numerics.apply()  # a reward rounds as it did in the run
    by_manifest: dict[str, list[Damage]] = {}
    for damage in damages:
        by_manifest.setdefault(damage.manifest, []).append(damage)
    parts = [(parsed, key) for key in by_manifest if (parsed := repairable_part(key))]
    parts.sort(key=lambda part: (REPAIRABLE.index(part[0][0]), part[1]))
    outcomes = []
    for (kind, where), key in parts:
        try:
            _rebuild(run, key, by_manifest[key], kind, where)
        except NotTrusted:
            raise
        except Exception as error:  # the other parts can still be repaired
            outcomes.append(Repair(key, False, f"{type(error).__name__}: {error}"))
        else:
            outcomes.append(Repair(key, True))
    return outcomes


def _rebuild(run: Run, manifest: str, damages: list[Damage], kind: Kind, where: Partition) -> None:
    if where.run_id != run.run_id:
        raise _belongs_to(where.run_id)
    if where.reward_id not in (None, run.reward_id):
        raise NotRepaired("it belongs to another reward than this run's own")
    damaged = {damage.key for damage in damages}
    epoch, shard = where.epoch, where.shard or 0
    # In memory first: even damaged objects are only replaced by the committed bytes. The manifest
    # is hidden too, so that the part is rebuilt and not found.
    scratch = ScratchStore(run.store, damaged | {manifest})
    aside = replace(run, store=scratch)
    known = None if manifest in damaged else find(run.store, manifest)
    fork = run.fork
    if kind is ROLLOUTS and fork and fork.inherits(epoch):
        if known:  # the objects it lists are the parent's
            raise _belongs_to(fork.parent_id)
        inherit_shard(aside, epoch, shard)
    elif kind is ROLLOUTS:
        shard_of(aside, _made_with(aside, known, run.drawn_by(epoch)), epoch, shard)
    elif kind is SCORES:
        scores_of(aside, run.scorer, _rollouts(aside, epoch, shard), epoch, shard)
    else:
        shards = range(run.shards_per_epoch)
        rollouts = [_rollouts(aside, epoch, number) for number in shards]
        scores = [_scores(aside, epoch, number) for number in shards]
        before = _made_with(aside, known, Partition(run.run_id, epoch))
        committed_credit(aside, run.scorer, before, rollouts, scores, epoch)
    # The digest of a manifest without references is unknown: undamaged objects must match too.
    differs = any(
        run.store.read(key) != made if key == manifest else not run.store.exists(key)
        for key, made in scratch.written.items()
        if key not in damaged
    )
    for damage in damages:
        made = scratch.written.get(damage.key)
        digest_known = len(damage.expected) == 64
        if made is None or (digest_known and sha256_bytes(made) != damage.expected):
            differs = True
    if differs:
        raise NotRepaired(
            "the rebuilt bytes differ from the committed ones; use the kind of device and the "
            f"versions that made it: {run.numerics.device_name}, {run.numerics.versions}"
        )
    for damage in damages:
        run.store.replace(damage.key, scratch.written[damage.key])


def _belongs_to(run_id: str) -> NotRepaired:
    return NotRepaired(f"it belongs to run {run_id!r}: `ddpo verify {run_id} --repair` rebuilds it")


def _made_with(run: Run, known: Committed | None, otherwise: Partition) -> Ref:
    """Return the checkpoint, or other holder of the statistics, that a part was made from.

    The part's manifest names it: a comparison's shared samples all come from one checkpoint.
    Without a manifest it is the one given.
    """
    if known is None:
        return _found(run, CHECKPOINT, otherwise)
    ref = Ref.model_validate(known.manifest.inputs["checkpoint"])
    if find(run.store, ref.key) is None:
        raise _is_missing(ref.key)
    return ref


def _rollouts(run: Run, epoch: int, shard: int) -> Ref[RolloutShard]:
    return _found(run, ROLLOUTS, Partition(run.run_id, epoch, shard))


def _scores(run: Run, epoch: int, shard: int) -> Ref[Scores]:
    return _found(run, SCORES, Partition(run.run_id, epoch, shard, run.reward_id))


def _found(run: Run, kind: Kind, where: Partition) -> Ref:
    found = kind.find(run.store, where)
    if found is None:
        raise _is_missing(kind.key(where))
    return found


def _is_missing(key: str) -> NotRepaired:
    return NotRepaired(f"{key} is missing too, and this part is made from it")
