"""The task that samples one shard of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from ddpo.basics.images import encode_image
from ddpo.basics.randomness import derive_seed, generator
from ddpo.diffusion.sampling import Trajectories, sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.prompts import Prompt, draw_prompt
from ddpo.runs import Run
from ddpo.store import keys
from ddpo.store.artefacts import RolloutShard
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, ROLLOUTS, committed
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects
from ddpo.store.tables import RolloutRow, encode_rollouts, encode_samples
from ddpo.store.tensors import write_tensors
from ddpo_workflow.tasks.engines import on_device
from ddpo_workflow.tasks.inherit import inherit_shard
from ddpo_workflow.tasks.preferences import encoded_shard
from ddpo_workflow.tasks.progress import report
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import ON_DEVICE, RunHandle, opened, policy_at


@task(
    name="sample",
    task_run_name="sample epoch {epoch} shard {shard}",
    tags=[ON_DEVICE],
    cache_policy=NO_CACHE,
    **STORAGE,
)
def sample_shard(
    handle: RunHandle, checkpoint: Ref[Checkpoint], epoch: int, shard: int
) -> Ref[RolloutShard]:
    """Sample and commit one shard of an epoch, or encode preference pairs, or inherit or find it.

    Args:
        handle: The run.
        checkpoint: The checkpoint that draws the epoch.
        epoch: The epoch.
        shard: The shard, from 0.
    """
    return on_device(_shard_of, handle, checkpoint, epoch, shard)


def _shard_of(
    handle: RunHandle, checkpoint: Ref[Checkpoint], epoch: int, shard: int
) -> Ref[RolloutShard]:
    return shard_of(opened(handle), checkpoint, epoch, shard)


def shard_of(run: Run, checkpoint: Ref[Checkpoint], epoch: int, shard: int) -> Ref[RolloutShard]:
    """Return the shard; sample and commit it if it is not committed. See `sample_shard`."""
    if run.fork and run.fork.inherits(epoch):
        return inherit_shard(run, epoch, shard)
    return committed(
        run.store,
        ROLLOUTS,
        Partition(run.run_id, epoch, shard),
        {"checkpoint": checkpoint, "epoch": epoch, "shard": shard},
        lambda: (
            encoded_shard(run, run.pairs, checkpoint, epoch, shard)
            if run.pairs
            else _sampled(run, checkpoint, epoch, shard)
        ),
    )


def _sampled(run: Run, checkpoint: Ref[Checkpoint], epoch: int, shard: int) -> Objects:
    size = run.config.rollouts.shard_size
    indices = range(shard * size, (shard + 1) * size)
    prompts = [prompt_of(run, epoch, index) for index in indices]
    seeds = [derive_seed(run.config.seed, "noise", epoch, index) for index in indices]
    before = indices[0]

    def on_images(count: int) -> None:
        nonlocal before
        before += count
        report("sample", before, run.config.rollouts.samples_per_epoch)

    with policy_at(run, checkpoint, weights=run.config.algorithm.needs.samples_from) as lease:
        report("sample", before, run.config.rollouts.samples_per_epoch)
        sampled = sample(
            lease.policy,
            [p.text for p in prompts],
            seeds,
            sampler_of_epoch(lease.policy, run.config, epoch),
            starts=_starts(run, epoch, indices),
            updates=lease.state.updates,
            on_images=on_images,
        )
    rows = _rows(run, checkpoint, epoch, shard, indices, prompts, seeds, sampled)
    return {
        "rollouts": encode_rollouts(rows),
        "samples": encode_samples(rows),
        "trajectories": partial(write_tensors, _tensors(run, sampled)),
    }


def prompt_of(run: Run, epoch: int, index: int) -> Prompt:
    """Return the prompt of a sample, its group's; it depends on seed, epoch and group alone."""
    seed = derive_seed(run.config.seed, "prompt", epoch, _group_of(run, index))
    return draw_prompt(run.prompts, generator(seed))


def _starts(run: Run, epoch: int, indices: Sequence[int]) -> list[int] | None:
    """Return the seeds of samples' starting latents where their groups share them."""
    if not run.config.rollouts.shared_start:
        return None
    return [
        derive_seed(run.config.seed, "start", epoch, _group_of(run, index)) for index in indices
    ]


def _group_of(run: Run, index: int) -> int:
    return index // run.config.rollouts.samples_per_prompt


def _tensors(run: Run, sampled: Trajectories) -> dict[str, Tensor]:
    """Return what a shard keeps of its trajectories; see `RolloutShard.trajectories`."""
    if run.config.stored_trajectories == "final":
        return {"latents": sampled.latents[:, -1:]}
    return {
        "latents": sampled.latents,
        "log_probs": sampled.log_probs,
        "timesteps": sampled.times,
    }


def _rows(
    run: Run,
    checkpoint: Ref[Checkpoint],
    epoch: int,
    shard: int,
    indices: Sequence[int],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampled: Trajectories,
) -> list[RolloutRow]:
    loaded = CHECKPOINT.load(run.store, checkpoint)
    policy_digest = loaded.policy_digest(run.config.algorithm.needs.samples_from)
    return [
        RolloutRow(
            sample_id=keys.sample_id(run.run_id, epoch, index),
            shard=shard,
            index=index,
            prompt=prompts[row].text,
            prompt_metadata=prompts[row].metadata,
            seed=seeds[row],
            policy_digest=policy_digest,
            sampler_digest=loaded.digests["sampler_digest"],
            log_prob_mean=sampled.log_prob_mean(row),
            image_png=encode_image(sampled.images[row]),
        )
        for row, index in enumerate(indices)
    ]
