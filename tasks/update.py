"""The task that trains: one epoch's updates, from checkpoint k to checkpoint k + 1."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from ddpo.basics.mapped import stack_on_disk
from ddpo.config import FullConfig
from ddpo.errors import PolicyMismatch
from ddpo.models import policy_digest
from ddpo.runs import Run
from ddpo.store.artefacts import AdvantageTable, RolloutShard
from ddpo.store.checkpoints import Checkpoint, checkpoint_objects
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, ROLLOUTS
from ddpo.store.manifests import Ref
from ddpo.store.tables import AdvantageRow, SampleRow
from ddpo.training.loop import update
from ddpo.training.parts import rows_read
from ddpo.training.ranks import Ranks
from ddpo.training.samples import Samples, samples_of
from ddpo_workflow.tasks.engines import on_all_devices
from ddpo_workflow.tasks.engines.base import Seat
from ddpo_workflow.tasks.engines.seats import seated
from ddpo_workflow.tasks.progress import report
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened, policy_at

_logger = logging.getLogger(__name__)


@task(name="update", task_run_name="update epoch {epoch}", cache_policy=NO_CACHE, **STORAGE)
def update_policy(
    handle: RunHandle,
    checkpoint: Ref[Checkpoint],
    rollouts: Sequence[Ref[RolloutShard]],
    advantages: Ref[AdvantageTable],
    epoch: int,
) -> Ref[Checkpoint]:
    """Run one epoch's updates and commit the next checkpoint.

    Args:
        handle: The run.
        checkpoint: The checkpoint before the epoch.
        rollouts: The epoch's shards, in order.
        advantages: The epoch's advantages.
        epoch: The epoch.

    Returns:
        The manifest of checkpoint ``epoch + 1``.

    Raises:
        PolicyMismatch: The rollouts come from another policy or sampler.
        NonFiniteError: A loss, log-prob or gradient is NaN or infinite; nothing was committed.
    """
    return on_all_devices(_updated, handle, checkpoint, list(rollouts), advantages, epoch)


def _updated(
    seat: Seat,
    handle: RunHandle,
    checkpoint: Ref[Checkpoint],
    rollouts: Sequence[Ref[RolloutShard]],
    advantages: Ref[AdvantageTable],
    epoch: int,
) -> Ref[Checkpoint]:
    run = opened(handle)
    where, whole = Partition(run.run_id, epoch + 1), isinstance(run.config.trainable, FullConfig)
    inputs = {"checkpoint": checkpoint, "rollouts": list(rollouts), "advantages": advantages}
    if found := CHECKPOINT.find(run.store, where, inputs):
        return found
    before = CHECKPOINT.load(run.store, checkpoint)
    digests = dict(before.digests)
    shards = [ROLLOUTS.load(run.store, ref) for ref in rollouts]
    rows = [shard.samples() for shard in shards]
    drawn_by = run.drawn_by(epoch)
    own = drawn_by == Partition(run.run_id, epoch)
    drew = before if own else CHECKPOINT.require(run.store, drawn_by)
    _check_origin(run, list(chain(*rows)), drew, epoch)
    scored = ADVANTAGES.load(run.store, advantages)
    credit = _credit_table(scored.rows(), [row.sample_id for row in chain(*rows)])
    statistics = scored.statistics()
    report("update", 0.0, 1.0)
    with (
        policy_at(run, checkpoint, training=True) as lease,
        seated(seat, lease.policy.device, split=whole) as ranks,
    ):
        needed = rows_read(lease.policy, credit, run.config, lease.state.epoch, ranks)
        state, metrics = update(
            lease.policy,
            lease.state,
            _read_samples(shards, rows, needed, ranks),
            credit,
            statistics,
            run.config,
            ranks=ranks,
            on_progress=lambda share: report("update", share, 1.0) if seat.rank == 0 else None,
        )
        digests["policy_digest"] = policy_digest(lease.policy.base_digest, state.weights)
        if state.ema:
            digests["ema_digest"] = policy_digest(lease.policy.base_digest, state.ema)
        if state.old:
            digests["old_digest"] = policy_digest(lease.policy.base_digest, state.old)
        if seat.rank > 0:
            return checkpoint  # rank 0 commits the next one
        if metrics["loss"] is None:
            _logger.warning(
                "epoch %d made no update: %s found nothing to learn from in its %d samples, and "
                "the weights stay as they are",
                epoch,
                run.config.algorithm.type,
                len(credit["reward"]),
            )
        objects = checkpoint_objects(state, digests, metrics)
        done = CHECKPOINT.commit(run.store, where, inputs, objects)
        if not done.diverged:
            lease.hold(done.ref, state)
    return done.ref


def _credit_table(rows: Sequence[AdvantageRow], sample_ids: Sequence[str]) -> dict[str, Tensor]:
    """Return the credit's columns, float32 each, in the order of the samples."""
    by_id = {row.sample_id: row for row in rows}
    ordered = [by_id[sample_id] for sample_id in sample_ids]
    columns = {
        "reward": [float("nan") if row.reward is None else row.reward for row in ordered],
        **{name: [row.columns[name] for row in ordered] for name in ordered[0].columns},
    }
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}


def _check_origin(run: Run, rows: Sequence[SampleRow], checkpoint: Checkpoint, epoch: int) -> None:
    """Refuse samples of another policy or sampler than those of the checkpoint that drew them."""
    off_policy = run.fork is not None and run.fork.is_off_policy(epoch)
    expected = {
        "policy_digest": checkpoint.policy_digest(run.config.algorithm.needs.samples_from),
        "sampler_digest": checkpoint.digests["sampler_digest"],
    }
    if pairs := run.pairs_digest(epoch):
        expected = dict.fromkeys(expected, pairs)
    for row in rows:
        for name, digest in expected.items():
            if name == "policy_digest" and off_policy and not pairs:
                continue
            if getattr(row, name) != digest:
                raise PolicyMismatch(
                    f"sample {row.sample_id} has {name} {getattr(row, name)}, expected "
                    f"{digest}: it comes from another policy or sampler than the one that draws "
                    f"epoch {epoch}, so importance ratios would be wrong. A fork can train on "
                    "samples of another policy with fork.off_policy: true"
                )


def _read_samples(
    shards: Sequence[RolloutShard],
    rows: Sequence[Sequence[SampleRow]],
    needed: set[int],
    ranks: Ranks,
) -> Samples:
    """Read the trajectories of those shards that have a sample this rank needs.

    Args:
        shards: The epoch's, in order.
        rows: The samples of each.
        needed: Rows of the epoch's samples.
        ranks: All ranks give each other the log-probs that they have read.
    """
    count = sum(len(own) for own in rows)
    places = torch.full((count,), -1)
    read: list[tuple[int, RolloutShard]] = []
    first = done = 0
    for shard, own in zip(shards, rows, strict=True):
        # A rank that computes nothing reads one as well, to know the shapes.
        if not (needed or {0}).isdisjoint(range(first, first + len(own))):
            read.append((first, shard))
            places[first : first + len(own)] = torch.arange(done, done + len(own))
            done += len(own)
        first += len(own)
    log_probs: list[tuple[int, Tensor]] = []

    def latents() -> Iterator[Tensor]:
        for start, shard in read:
            tensors = shard.trajectories()
            if "log_probs" in tensors:
                log_probs.append((start, tensors["log_probs"].clone()))  # not the shard with it
            yield tensors["latents"]
            del tensors  # before the next shard is read

    tensors = {"latents": stack_on_disk(latents(), done)}
    if log_probs:
        whole = torch.full((count, log_probs[0][1].shape[1]), torch.nan)
        for start, own in log_probs:
            whole[start : start + len(own)] = own
        tensors["log_probs"] = ranks.merged(whole)
    prompts = [row.prompt for row in chain(*rows)]
    return samples_of(prompts, tensors, None if done == count else places)
