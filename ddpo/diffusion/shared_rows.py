"""One prediction for rows of a batch that are the same.

Samples of a group that start from the same noise (``rollouts.shared_start``) are the same until the
first step that draws noise, that step's prediction included.

Shapes: N rows, of which M differ; C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ddpo.config import RunConfig
from ddpo.diffusion.window import process_of, sampler_of_epoch
from ddpo.models import Conditioning, Policy


@dataclass(frozen=True)
class SharedRows:
    """Which rows are the same as the one before; those are predicted with it."""

    counts: Sequence[int]
    """[M], how many rows each of the different ones stands for, N together."""

    @classmethod
    def of(cls, alike: Iterable[bool]) -> SharedRows:
        """Take rows by whether each but the first, N - 1 of them, is the same as the one before."""
        counts = [1]
        for same in alike:
            if same:
                counts[-1] += 1
            else:
                counts.append(1)
        return cls(counts)

    def __len__(self) -> int:
        return len(self.counts)

    def predict(
        self,
        policy: Policy,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> Tensor:
        """Predict each of the different rows once.

        Args:
            policy: The policy.
            latents: [N, C, h, w] float32.
            times: [N] float32, on the schedule's axis.
            conditioning: N rows.
            guidance_scale: 1 is none.

        Returns:
            [N, C, h, w]; a gradient through it is the sum over the rows of each prediction.
        """
        if len(self.counts) == len(latents):
            return policy.predict(latents, times, conditioning, guidance_scale)
        ends = torch.tensor(self.counts).cumsum(0)
        first = (ends - torch.tensor(self.counts)).to(latents.device)
        output = policy.predict(
            latents[first], times[first], conditioning.rows(first), guidance_scale
        )
        # Not by an index: its backward adds up in any order on a GPU.
        parts = zip(output.split(1), self.counts, strict=True)
        return torch.cat([row.expand(count, *row.shape[1:]) for row, count in parts])


def shared_rows(prompts: Sequence[str], steps: Tensor, latents: Tensor) -> SharedRows:
    """Find rows that are the same by what they hold.

    Args:
        prompts: N prompts.
        steps: [N] int64, steps of the denoising process.
        latents: [N, C, h, w] on the CPU.
    """
    same = (latents[1:] == latents[:-1]).flatten(1).all(dim=1) & (steps[1:] == steps[:-1])
    texts = (one == other for one, other in pairwise(prompts))
    return SharedRows.of(a and b for a, b in zip(same.tolist(), texts, strict=True))


def shared_starts(prompts: Sequence[str], starts: Sequence[int]) -> SharedRows:
    """Return which samples are the same before any step draws noise.

    Args:
        prompts: N prompts.
        starts: N seeds of their starting latents.
    """
    return SharedRows.of(one == other for one, other in pairwise(zip(prompts, starts, strict=True)))


def sampling_forwards(policy: Policy, config: RunConfig, epoch: int) -> int:
    """Return how many forwards of the network, one image each, draw an epoch's samples.

    Args:
        policy: Its numerics say how many images share a forward.
        config: Samples, groups and sampler.
        epoch: The epoch, which a window's place may depend on.
    """
    rollouts = config.rollouts
    process = process_of(policy, sampler_of_epoch(policy, config, epoch))
    predictions = rollouts.samples_per_epoch * process.steps
    if rollouts.shared_start:
        draws = process.stochastic().tolist()
        alike = draws.index(True) + 1 if any(draws) else process.steps
        size = policy.numerics.sample_batch_size
        shard, group = rollouts.shard_size, rollouts.samples_per_prompt
        batches = (
            range(start, min(start + size, begin + shard))
            for begin in range(0, rollouts.samples_per_epoch, shard)
            for start in range(begin, begin + shard, size)
        )
        groups = sum(len({index // group for index in batch}) for batch in batches)
        predictions -= alike * (rollouts.samples_per_epoch - groups)
    return predictions * policy.forwards(config.sampler.guidance_scale)
