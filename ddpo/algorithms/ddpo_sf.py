"""DDPO with the score function estimator (arXiv 2305.13301, equation DDPO-SF; REINFORCE)."""

from __future__ import annotations

from torch import Tensor


def ddpo_sf_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Return -A log p, whose gradient is the policy gradient at the sampling policy only.

    Args:
        log_probs: [N], of the policy that sampled and is being updated.
        advantages: [N].

    Returns:
        [N], one loss a (sample, timestep) pair.
    """
    return -advantages * log_probs
