"""DDPO with importance sampling (arXiv 2305.13301, equation DDPO-IS), clipped as in PPO."""

from __future__ import annotations

import torch
from torch import Tensor


def ddpo_is_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_range: float
) -> Tensor:
    """Return max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) with rho = exp(log p_new - log p_old).

    Args:
        log_probs: [N], of the policy being updated.
        old_log_probs: [N], of the policy that sampled.
        advantages: [N].
        clip_range: eps.

    Returns:
        [N], one loss a (sample, timestep) pair.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)
