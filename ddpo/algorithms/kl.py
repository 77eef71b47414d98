"""KL divergence from the base model, as a penalty (DPOK, arXiv 2305.16381, section 4.2)."""

from __future__ import annotations

from torch import Tensor


def gaussian_kl(mean: Tensor, base_mean: Tensor, std: Tensor) -> Tensor:
    """Return KL(Normal(mean, std² I) || Normal(base_mean, std² I)), (mean - base_mean)² / (2 std²).

    Averaged over latent dimensions, as log-densities are.

    Args:
        mean: [N, C, h, w], of the policy.
        base_mean: [N, C, h, w], of the base model in the same states.
        std: [N, 1, 1, 1], of both; above 0.

    Returns:
        [N], not negative.
    """
    return ((mean - base_mean) ** 2 / (2 * std**2)).mean(dim=(1, 2, 3))
