"""One shard of an epoch whose images are preference pairs: read, encode, and keep them as samples.

Sample 2n of an epoch is the chosen image of the epoch's n-th pair, and 2n + 1 the rejected one.
"""

from __future__ import annotations

from functools import partial

import torch

from ddpo.basics.images import encode_image
from ddpo.preferences import PairFiles
from ddpo.rewards.builtin.preference import PREFERRED
from ddpo.runs import Run
from ddpo.store import keys
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects
from ddpo.store.tables import RolloutRow, encode_rollouts, encode_samples
from ddpo.store.tensors import write_tensors
from ddpo_workflow.tasks.progress import report
from ddpo_workflow.tasks.worker import policy_at


def encoded_shard(
    run: Run, pairs: PairFiles, checkpoint: Ref[Checkpoint], epoch: int, shard: int
) -> Objects:
    """Return the objects of a shard.

    Args:
        run: The run.
        pairs: Its preference pairs.
        checkpoint: The checkpoint before the epoch.
        epoch: The epoch.
        shard: The shard, from 0.

    Raises:
        ConfigError: A pair cannot be used.
    """
    total, size = run.config.rollouts.samples_per_epoch, run.config.rollouts.shard_size
    indices = range(shard * size, (shard + 1) * size)
    first = epoch * (total // 2)
    numbers = [first + index // 2 for index in indices]
    preferred = [index % 2 == 0 for index in indices]
    latents = []
    with policy_at(run, checkpoint) as lease:
        policy, batch = lease.policy, lease.policy.numerics.sample_batch_size
        report("sample", indices[0], total)
        own = pairs.read(numbers, policy.size)
        images = [
            pair.chosen if is_chosen else pair.rejected
            for pair, is_chosen in zip(own, preferred, strict=True)
        ]
        for start in range(0, size, batch):
            latents.append(policy.encode_images(images[start : start + batch]).cpu())
            report("sample", indices[0] + min(start + batch, size), total)
    rows = [
        RolloutRow(
            sample_id=keys.sample_id(run.run_id, epoch, index),
            shard=shard,
            index=index,
            prompt=pair.prompt.text,
            prompt_metadata={**pair.prompt.metadata, PREFERRED: is_chosen, "pair": pair.row},
            seed=0,
            policy_digest=pairs.digest,
            sampler_digest=pairs.digest,
            log_prob_mean=None,
            image_png=encode_image(image),
        )
        for index, pair, is_chosen, image in zip(indices, own, preferred, images, strict=True)
    ]
    return {
        "rollouts": encode_rollouts(rows),
        "samples": encode_samples(rows),
        "trajectories": partial(write_tensors, {"latents": torch.cat(latents)[:, None]}),
    }
