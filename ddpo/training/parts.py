"""Which samples of an epoch each rank of an update reads: those that it computes something of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from ddpo.algorithms.policy_gradient import PolicyGradient
from ddpo.config import RunConfig
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import Policy
from ddpo.training.ranks import Ranks
from ddpo.training.trajectories import probe_rows
from ddpo.training.trajectory_gradient import TrajectoryGradient


def rows_read(
    policy: Policy, credit: Mapping[str, Tensor], config: RunConfig, epoch: int, ranks: Ranks
) -> set[int]:
    """Return the samples whose latents this rank needs for its part of an epoch's updates.

    An algorithm that trains on final latents alone takes the samples in another order in each pass,
    so each rank needs them all, which are small.

    Args:
        policy: The policy that is trained.
        credit: The epoch's credit table, [S] each.
        config: Algorithm, sampler, seed.
        epoch: The epoch.
        ranks: The processes that run the updates together. Each sample of an update is read by one
            of them at least.

    Returns:
        Rows of the epoch's samples.
    """
    algorithm = config.algorithm
    count = len(credit["reward"])
    if algorithm.needs.data == "final_latents":
        return set(range(count))
    algorithm = cast(PolicyGradient, algorithm)
    sampler = sampler_of_epoch(policy, config, epoch)
    gradient = TrajectoryGradient(policy, sampler, algorithm, ranks)
    updates = algorithm.updates(credit, run_seed=config.seed, epoch=epoch)
    probe = probe_rows(policy, algorithm, count)
    return {
        row
        for samples in (probe, *(each.samples for each in updates))
        if samples
        for batch in gradient.mine(samples)
        for row in batch.samples.tolist()
    }
