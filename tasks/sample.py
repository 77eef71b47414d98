"""The task that draws one shard of an epoch's trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from ddpo.basics.images import encode_image
from ddpo.basics.randomness import derive_seed, generator
from ddpo.diffusion.sampling import Trajectories, sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.prompts import Prompt, draw_prompt
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import load_document
from ddpo.store.manifests import Committed, Ref
from ddpo.store.tables import RolloutRow, encode_rollouts
from ddpo.store.tensors import encode_tensors
from ddpo_workflow.tasks.adopt import adopt_shard
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
def sample_shard(handle: RunHandle, checkpoint: Ref, epoch: int, shard: int) -> Ref:
    """Draw and commit one shard: a row a sample, and its trajectories.

    In the epochs that a fork adopts, the shard that is saved already.

    Args:
        handle: The run.
        checkpoint: The checkpoint before the epoch.
        epoch: The epoch.
        shard: The shard, from 0.

    Returns:
        The shard's manifest.
    """
    run = opened(handle)
    if run.config.fork and run.config.fork.adopts(epoch):
        return adopt_shard(run, epoch, shard).ref
    key, inputs = _identity(run, checkpoint, epoch, shard)
    done = manifests.find(run.store, key, inputs=inputs)
    return (done or draw_shard(run, checkpoint, epoch, shard)).ref


def _identity(run: Run, checkpoint: Ref, epoch: int, shard: int) -> tuple[str, dict[str, Any]]:
    """Return a shard's manifest key, and what it is made from."""
    inputs = {"checkpoint": checkpoint.model_dump(), "epoch": epoch, "shard": shard}
    return keys.rollout_manifest_key(run.run_id, epoch, shard), inputs


def draw_shard(run: Run, checkpoint: Ref, epoch: int, shard: int) -> Committed:
    """Draw and commit one shard, whether or not it is committed already.

    Args:
        run: The run.
        checkpoint: The checkpoint before the epoch.
        epoch: The epoch.
        shard: The shard, from 0.

    Returns:
        The commit; of an earlier writer, if there was one.
    """
    size = run.config.rollouts.shard_size
    indices = range(shard * size, (shard + 1) * size)
    prompts = [prompt_of(run, epoch, index) for index in indices]
    seeds = [derive_seed(run.config.seed, "noise", epoch, index) for index in indices]
    before = indices[0]

    def on_pictures(count: int) -> None:
        nonlocal before
        before += count
        report("sample", before, run.config.rollouts.samples_per_epoch)

    with policy_at(run, checkpoint) as lease:
        report("sample", before, run.config.rollouts.samples_per_epoch)
        drawn = sample(
            lease.policy,
            [p.text for p in prompts],
            seeds,
            sampler_of_epoch(lease.policy, run.config, epoch),
            on_pictures=on_pictures,
        )
    rows = _rows(run, checkpoint, epoch, shard, indices, prompts, seeds, drawn)
    table = keys.rollout_stem(run.run_id, epoch, shard)
    trajectories = keys.trajectory_stem(run.run_id, epoch, shard)
    objects = {
        "rollouts": run.store.put(table, ".parquet", encode_rollouts(rows)),
        "trajectories": run.store.put(
            trajectories, ".safetensors", encode_tensors(_tensors(run, drawn))
        ),
    }
    key, inputs = _identity(run, checkpoint, epoch, shard)
    return manifests.commit(run.store, key, kind="rollouts", inputs=inputs, objects=objects)


def prompt_of(run: Run, epoch: int, index: int) -> Prompt:
    """Return the prompt of a sample, its group's; it depends on seed, epoch and group alone."""
    group = index // run.config.rollouts.samples_per_prompt
    return draw_prompt(run.prompts, generator(derive_seed(run.config.seed, "prompt", epoch, group)))


def _tensors(run: Run, drawn: Trajectories) -> dict[str, Tensor]:
    """Return what a trajectory shard holds of B samples in T steps.

    Full: ``latents`` [B, T+1, C, h, w] from noise to clean, ``log_probs`` [B, T] and ``timesteps``
    [T]. Final: ``latents`` [B, 1, C, h, w], the clean ones.
    """
    if run.config.stored_trajectories == "final":
        return {"latents": drawn.latents[:, -1:]}
    return {
        "latents": drawn.latents,
        "log_probs": drawn.log_probs,
        "timesteps": drawn.timesteps,
    }


def _rows(
    run: Run,
    checkpoint: Ref,
    epoch: int,
    shard: int,
    indices: Sequence[int],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    drawn: Trajectories,
) -> list[RolloutRow]:
    digests = load_document(run.store, manifests.load(run.store, checkpoint), "digests")
    return [
        RolloutRow(
            sample_id=keys.sample_id(run.run_id, epoch, index),
            shard=shard,
            index=index,
            prompt=prompts[row].text,
            prompt_metadata=prompts[row].metadata,
            seed=seeds[row],
            policy_digest=digests["policy_digest"],
            sampler_digest=digests["sampler_digest"],
            log_prob_mean=drawn.log_prob_mean(row),
            image_png=encode_image(drawn.images[row]),
        )
        for row, index in enumerate(indices)
    ]
