"""What corrects DDPO-IS by the means of the policy that sampled: GRPO-Guard and Flow-DPPO.

Shapes: N pairs of one forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpo.basics.tensors import mean_per_row

if TYPE_CHECKING:
    from torch import Tensor

    from ddpo.algorithms.policy_gradient import PairBatch


def guard_ratio(batch: PairBatch) -> Tensor:
    """Return GRPO-Guard's normalised ratio (arXiv 2510.22319, equation 8), [N].

    exp(s (log p_new - log p_old) + mean (mu_new - mu_old)² / (2 s)), where s is the step's own
    standard deviation. With x = mu_old + s eps, what is in the exponent is the mean of
    eps (mu_new - mu_old): without the second term it would be negative in expectation, and without
    the factor s, steps of little noise would leave a clip range first.
    """
    assert batch.old_mean is not None, "the algorithm does not say that it needs old means"
    std = batch.current.std.flatten()
    drift = mean_per_row((batch.current.mean - batch.old_mean) ** 2)
    return ((batch.log_probs - batch.old_log_probs) * std + drift / (2 * std)).exp()


def leaves_further(ratio: Tensor, advantages: Tensor, divergence: Tensor, limit: float) -> Tensor:
    """Return which pairs Flow-DPPO drops (arXiv 2606.11025), [N] bool.

    Those whose step is too far from the sampling policy's and whose loss drives it further: a
    likelier sample still likelier, or an unlikelier one still unlikelier.

    Args:
        ratio: [N], p_new / p_old.
        advantages: [N].
        divergence: [N], the KL divergence of the step from the sampling policy's.
        limit: The least divergence that is too far.
    """
    further = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
    return further & (divergence >= limit)
