"""KL divergence from the base model, as a penalty (DPOK, arXiv 2305.16381, section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpo.basics.tensors import mean_per_row

if TYPE_CHECKING:
    from torch import Tensor

    from ddpo.algorithms.base import RunSettings


def gaussian_kl(mean: Tensor, base_mean: Tensor, std: Tensor) -> Tensor:
    """Return KL(Normal(mean, std² I) || Normal(base_mean, std² I)), (mean - base_mean)² / (2 std²).

    Averaged over latent dimensions, as log-densities are.

    Args:
        mean: [N, ...], of the policy.
        base_mean: [N, ...], of the base model in the same states.
        std: [N, 1, ...], of both; above 0.

    Returns:
        [N], not negative.
    """
    return mean_per_row((mean - base_mean) ** 2 / (2 * std**2))


def check_kl_weight(kl_weight: float, run: RunSettings) -> None:
    """Check that there is a base model to keep near to.

    Args:
        kl_weight: Weight of the penalty.
        run: The run's settings.

    Raises:
        ValueError: There is none.
    """
    if kl_weight and not run.keeps_base_model:
        raise ValueError(
            f"algorithm.kl_weight is {kl_weight:g} with `trainable: full`: the base model is what "
            "remains when the adapter is switched off, and full fine-tuning has no adapter; set "
            "`trainable: {type: lora}`, or kl_weight to 0"
        )
