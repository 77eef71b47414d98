"""The (sample, timestep) pairs that an update is made of, in micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """One micro-batch of (sample, timestep) pairs, as indices into rollouts."""

    samples: Tensor
    """[N] int64, rows of the rollouts."""
    steps: Tensor
    """[N] int64, columns: 0 is the noisiest."""


def micro_batches(samples: Sequence[int], steps: Sequence[int], size: int) -> Iterator[Pairs]:
    """Cut the pairs of one update into micro-batches, timestep by timestep.

    With ``size`` equal to the sampler's batch size, each micro-batch repeats one of its forwards.

    Args:
        samples: Rows of the rollouts.
        steps: Columns with a log-prob.
        size: Pairs per micro-batch; the last may be smaller.

    Yields:
        Micro-batches that cover every pair once.
    """
    pairs = torch.cartesian_prod(torch.tensor(steps), torch.tensor(samples)).view(-1, 2)
    for chunk in pairs.split(size):
        yield Pairs(samples=chunk[:, 1], steps=chunk[:, 0])
