"""DDPO with importance sampling (arXiv 2305.13301, equation DDPO-IS), clipped as in PPO."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from ddpo.algorithms.base import Needs, RunSettings
from ddpo.algorithms.old_policy import guard_ratio, leaves_further
from ddpo.algorithms.policy_gradient import PairBatch, PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor

    from ddpo.algorithms.step_weighting import StepScales

_CLIP_RANGE, _GUARD_CLIP_RANGE, _KL_LIMIT = 1e-4, 2e-6, 1e-5


def _is_default_clip(value: Any) -> bool:
    return value == "ratio"


def _is_default_ratio(value: Any) -> bool:
    return value == "plain"


def _is_default_limit(value: Any) -> bool:
    return value == _KL_LIMIT


class DdpoIs(PolicyGradient):
    """DDPO-IS: several updates on one round of samples, corrected by clipped importance ratios."""

    type: Literal["ddpo_is"] = "ddpo_is"
    clip_range: PositiveFloat = _CLIP_RANGE
    """The ratio is clipped to 1 ± this; so small because log-densities are means over latent
    dimensions. 2e-6 by default with `ratio: guard`."""
    old_log_probs: Literal["auto", "stored", "recompute"] = "auto"
    """Where the ratio's denominator comes from. `auto` recomputes it in the update's own graph if
    rounding moves the ratio by more than a tenth of the clip range before any update; float32 on a
    CPU does not, anything else is measured."""
    ratio: Literal["plain", "guard"] = Field(default="plain", exclude_if=_is_default_ratio)
    """`plain`: p_new / p_old. `guard`: GRPO-Guard's, centred and scaled so that all steps leave the
    clip range alike, with losses divided by the steps' lengths (arXiv 2510.22319)."""
    clip: Literal["ratio", "kl_mask"] = Field(default="ratio", exclude_if=_is_default_clip)
    """What keeps updates near the policy that sampled. `ratio`: the clip range. `kl_mask`: no
    clipping, but pairs whose step is too far from the sampling policy's are left out if their loss
    drives it further (Flow-DPPO, arXiv 2606.11025)."""
    kl_limit: PositiveFloat = Field(default=_KL_LIMIT, exclude_if=_is_default_limit)
    """With `clip: kl_mask`, the KL divergence of a step, a mean over latent dimensions, from which
    on it is too far."""

    @model_validator(mode="before")
    @classmethod
    def _clip_range_of_guard(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("ratio") == "guard":
            return {"clip_range": _GUARD_CLIP_RANGE, **given}
        return given

    @model_validator(mode="after")
    def _options_fit(self) -> DdpoIs:
        if self.clip == "kl_mask" and self.ratio == "guard":
            raise ValueError(
                "clip is kl_mask with `ratio: guard`, but Flow-DPPO's mask belongs to the plain "
                "ratio, and GRPO-Guard's ratio is clipped; set one of them alone"
            )
        if self.clip == "kl_mask" and self.clip_range != _CLIP_RANGE:
            raise ValueError(
                f"clip_range {self.clip_range:g} has no effect with `clip: kl_mask`; set kl_limit, "
                "or `clip: ratio`"
            )
        if self.clip == "ratio" and self.kl_limit != _KL_LIMIT:
            raise ValueError(
                f"kl_limit {self.kl_limit:g} has no effect with `clip: ratio`; set clip_range, or "
                "`clip: kl_mask`"
            )
        if self.ratio == "guard" and self.step_weighting != "none":
            raise ValueError(
                f"step_weighting is {self.step_weighting} with `ratio: guard`, which weighs the "
                "steps already; set one of them alone"
            )
        return self

    @property
    def needs(self) -> Needs:
        """As every policy gradient; and the sampling policy's means for what compares with them."""
        return replace(super().needs, old_means=self.ratio == "guard" or self.clip == "kl_mask")

    @property
    def tolerated_deviation(self) -> float:
        """How far the initial importance ratio may be from 1 before it is recomputed.

        Old means are computed in the update's own graph, and old log-probs with them at no cost.
        """
        limits = {"stored": float("inf"), "recompute": 0.0, "auto": self.clip_range / 10}
        return 0.0 if self.needs.old_means else limits[self.old_log_probs]

    def off_policy(self) -> DdpoIs:
        """Return the algorithm with ratios relative to the policy that sampled.

        `auto` takes the ratio's distance from 1 for rounding, but off-policy it is also what was
        learned; and recomputed log-probs would be the trained policy's.
        """
        return self.changed(old_log_probs="stored")

    def check_run(self, run: RunSettings) -> None:
        """Check as every policy gradient, and that old log-probs are the sampling policy's."""
        super().check_run(run)
        option = "ratio: guard" if self.ratio == "guard" else "clip: kl_mask"
        if run.off_policy and self.needs.old_means:
            raise ValueError(
                f"algorithm has `{option}` with {run.off_policy}: it compares with the means of "
                "the policy that sampled, which the policy being updated cannot compute; remove it"
            )
        if self.old_log_probs == "stored" and self.needs.old_means:
            raise ValueError(
                f"algorithm.old_log_probs is stored with `{option}`, which computes them together "
                "with the old means; leave it at auto"
            )
        if self.ratio == "guard" and not run.log_probs_are_densities:
            raise ValueError(
                "algorithm.ratio is guard, which needs log-densities, and the sampler's log-probs "
                "leave the variance out, as published; set sampler.type to flow_sde or dance_sde, "
                "or algorithm.ratio to plain"
            )
        if run.off_policy and self.old_log_probs == "recompute":
            raise ValueError(
                f"algorithm.old_log_probs is recompute with {run.off_policy}: the policy being "
                "updated cannot compute the log-probs of the policy that sampled, and every ratio "
                "would be 1; leave it at auto or stored"
            )

    def policy_losses(self, batch: PairBatch) -> Tensor:
        """Return max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(log p_new - log p_old).

        With `clip: kl_mask`, -A rho, and 0 for pairs that are dropped.
        """
        ratio = self._ratio(batch)
        if self.clip == "kl_mask":
            return (-batch.advantages * ratio).masked_fill(self._dropped(ratio, batch), 0.0)
        clipped = ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
        return (-batch.advantages * ratio).maximum(-batch.advantages * clipped)

    def step_weights(self, scales: StepScales) -> Tensor | None:
        """Return what steps are weighed by: with `ratio: guard` the inverse of their lengths."""
        return 1 / scales.lengths if self.ratio == "guard" else super().step_weights(scales)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what :meth:`measured` returns."""
        own = ("clip_fraction", "kl_to_old") if self.needs.old_means else ()
        return super().measures + own

    def measured(self, batch: PairBatch) -> tuple[Tensor, ...]:
        """Return also the pairs that were clipped or dropped, and their KL from the old policy."""
        shared = super().measured(batch)
        if not self.needs.old_means:
            return shared
        ratio = self._ratio(batch).detach()
        lost = (ratio - 1).abs() > self.clip_range
        if self.clip == "kl_mask":
            lost = self._dropped(ratio, batch)
        return (*shared, lost.to(ratio), batch.kl_to_old.detach())

    def ratio_metrics(self, ratio: Tensor) -> dict[str, float]:
        """Return the share of pairs whose ratio left the clip range."""
        if self.needs.old_means:  # measured pair by pair
            return {}
        return {"clip_fraction": float(((ratio - 1).abs() > self.clip_range).double().mean())}

    def _ratio(self, batch: PairBatch) -> Tensor:
        if self.ratio == "guard":
            return guard_ratio(batch)
        return (batch.log_probs - batch.old_log_probs).exp()

    def _dropped(self, ratio: Tensor, batch: PairBatch) -> Tensor:
        return leaves_further(ratio, batch.advantages, batch.kl_to_old, self.kl_limit)
