"""DDPO with importance sampling (arXiv 2305.13301, equation DDPO-IS), clipped as in PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from ddpo.algorithms.base import RunSettings
from ddpo.algorithms.policy_gradient import PairBatch, PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor


class DdpoIs(PolicyGradient):
    """DDPO-IS: several updates on one round of samples, corrected by clipped importance ratios."""

    type: Literal["ddpo_is"] = "ddpo_is"
    clip_range: PositiveFloat = 1e-4
    """The ratio is clipped to 1 ± this; so small because log-densities are means over latent
    dimensions."""
    old_log_probs: Literal["auto", "stored", "recompute"] = "auto"
    """Where the ratio's denominator comes from. `auto` recomputes it in the update's own graph if
    rounding moves the ratio by more than a tenth of the clip range before any update; float32 on a
    CPU does not, anything else is measured."""

    @property
    def tolerated_deviation(self) -> float:
        """How far the initial importance ratio may be from 1 before it is recomputed."""
        limits = {"stored": float("inf"), "recompute": 0.0, "auto": self.clip_range / 10}
        return limits[self.old_log_probs]

    def off_policy(self) -> DdpoIs:
        """Return the algorithm with ratios relative to the policy that sampled.

        `auto` takes the ratio's distance from 1 for rounding, but off-policy it is also what was
        learned; and recomputed log-probs would be the trained policy's.
        """
        return self.changed(old_log_probs="stored")

    def check_run(self, run: RunSettings) -> None:
        """Check as every policy gradient, and that old log-probs are the sampling policy's."""
        super().check_run(run)
        if run.off_policy and self.old_log_probs == "recompute":
            raise ValueError(
                "algorithm.old_log_probs is recompute with fork.off_policy: the policy being "
                "updated cannot compute the log-probs of the policy that sampled, and every ratio "
                "would be 1; leave it at auto or stored"
            )

    def policy_losses(self, batch: PairBatch) -> Tensor:
        """Return max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(log p_new - log p_old)."""
        ratio = (batch.log_probs - batch.old_log_probs).exp()
        clipped = ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
        return (-batch.advantages * ratio).maximum(-batch.advantages * clipped)

    def ratio_metrics(self, ratio: Tensor) -> dict[str, float]:
        """Return the share of pairs whose ratio left the clip range."""
        return {"clip_fraction": float(((ratio - 1).abs() > self.clip_range).double().mean())}
