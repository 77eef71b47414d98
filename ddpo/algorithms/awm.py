"""AWM: advantage weighted matching of final latents (arXiv 2509.25050).

The training loss of the model itself stands in for a log-prob, of which the policy gradient is:

    distance = |v - v*|², a mean over latent dimensions, v* being the target
    log p    = -distance, -t distance, -t² distance                     uniform, t, t_squared
               -t (sqrt(distance + 1e-10) - 1e-5)                       huber
               -t ((distance + 1e-10)^p - 1e-10^p) / p                  ghuber, p = 0.25
    rho  = exp(log p - log p_start),   A = clip(A, -c, c) / c
    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps))
           + kl_weight |v - v_base|² + old_weight |v - v_old|²

log p_start is that of the weights that the epoch started with. With one optimizer step per epoch
these are the trained ones, rho is 1, and its gradient that of log p.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ddpo.algorithms.base import Needs
from ddpo.algorithms.denoising import DenoisingBatch, Times
from ddpo.algorithms.matching import AnyDecay, DecaySchedule, Matching, squared_distance

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-10


class Awm(Matching):
    """Advantage weighted matching: a policy gradient whose log-prob is the denoising loss."""

    type: Literal["awm"]
    weighting: Literal["uniform", "t", "t_squared", "huber", "ghuber"] = "ghuber"
    """How a squared distance at time t in (0, 1] becomes a log-prob."""
    ghuber_power: float = Field(default=0.25, gt=0.0, le=1.0)
    """The power of `ghuber`."""
    clip_range: PositiveFloat = 1.0
    """The ratio is clipped to 1 ± this."""
    kl_weight: NonNegativeFloat = 0.001
    """Weight of the squared distance from the base model's prediction. Above 0, an update costs one
    more forward per noised sample."""
    old_weight: NonNegativeFloat = 1.0
    """Weight of the squared distance from the old weights' prediction, which holds the policy near
    where it was. Above 0, an update costs one more forward per noised sample."""
    old_decay: AnyDecay = DecaySchedule(per_step=0.001, most=0.3)
    """How the old weights follow the trained ones: `{after, per_step, most}`, or a name as in
    `nft`."""
    times_per_sample: PositiveInt = 6
    """Times at which a sample is noised in each pass, one from each of so many equal parts of the
    sampler's steps; all of them if there are fewer steps."""
    steps_share: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of the sampler's steps, from the noisiest one, whose times are trained; rounded down,
    but at least one."""

    @property
    def needs(self) -> Needs:
        """Final latents; the weight sets that the loss refers to."""
        policies = {
            "base": self.kl_weight,
            "old": self.old_weight,
            "start": self.updates_per_epoch > 1,
        }
        return Needs("final_latents", frozenset(name for name, on in policies.items() if on))

    @property
    def times(self) -> Times:
        """Some of the sampler's steps, spread over all but the cleanest."""
        return Times("sampler", share=self.steps_share, count=self.times_per_sample)

    def decay_of_old(self, updates: int) -> float:
        """Return d of the schedule."""
        return self.old_decay.at(updates)

    def losses(self, batch: DenoisingBatch) -> Tensor:
        """Return the clipped loss of each noised sample [N], plus the weighted distances."""
        clip = self.advantages.clip
        ratio = self.ratios(batch)
        advantages = batch.credit["advantage"].to(ratio).clamp(-clip, clip) / clip
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        losses = (-advantages * ratio).maximum(-advantages * clipped)
        for name, weight in (("base", self.kl_weight), ("old", self.old_weight)):
            if weight:
                distance = squared_distance(batch.prediction, batch.others[name])
                losses = losses + weight * distance
        return losses

    def ratios(self, batch: DenoisingBatch) -> Tensor:
        """Return rho of each noised sample [N], with a gradient."""
        log_probs = self.log_probs(batch, batch.prediction)
        start = batch.others.get("start")
        before = log_probs if start is None else self.log_probs(batch, start)
        return (log_probs - before.detach()).exp()

    def log_probs(self, batch: DenoisingBatch, prediction: Tensor) -> Tensor:
        """Return what stands in for the log-prob of the samples.

        Args:
            batch: N noised samples.
            prediction: [N, ...], of them.

        Returns:
            [N], at most 0.
        """
        distance = squared_distance(prediction, batch.target)
        times = batch.times.to(distance)
        if self.weighting == "uniform":
            return -distance
        if self.weighting == "t":
            return -times * distance
        if self.weighting == "t_squared":
            return -(times**2) * distance
        power = 0.5 if self.weighting == "huber" else self.ghuber_power
        scale = 1.0 if self.weighting == "huber" else self.ghuber_power
        return -times * ((distance + _SMALL) ** power - _SMALL**power) / scale

    @property
    def measured(self) -> tuple[str, ...]:
        """The distances, and ``clip_fraction``."""
        return (*super().measured, "clip_fraction")

    def measures(self, batch: DenoisingBatch) -> Mapping[str, Tensor]:
        """Return the distances, and which ratios left the clip range (``clip_fraction``)."""
        beyond = (self.ratios(batch).detach() - 1).abs() > self.clip_range
        return {**super().measures(batch), "clip_fraction": beyond.to(batch.prediction.dtype)}
