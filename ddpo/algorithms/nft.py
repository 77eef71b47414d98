"""DiffusionNFT: contrast what is better with what is worse, on final latents (arXiv 2509.16117).

The policy is compared with an old one that drew the samples. Their predictions v and v_old are
mixed into a positive and a negative one, linear in the prediction:

    v+ = beta v + (1 - beta) v_old        v- = (1 + beta) v_old - beta v
    loss = c (r |x0(v+) - x0|² / w+ + (1 - r) |x0(v-) - x0|² / w-) / beta + kl_weight |v - v_base|²
    r = (clip(A, -c, c) / c + 1) / 2      w = mean |x0(v) - x0| without a gradient, at least 1e-5

|.|² is the mean over latent dimensions, x0(v) the clean latents that a prediction implies. Without
w, the optimum for one sample is v_old + (2 r - 1) (v* - v_old) / beta, v* being its target: towards
better samples, away from worse ones. All of it holds for whatever is linear in the prediction:
velocity, epsilon and v.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from ddpo.algorithms.base import Needs
from ddpo.algorithms.denoising import DenoisingBatch, Times
from ddpo.algorithms.matching import PUBLISHED_SCHEDULES, AnyDecay, Matching, squared_distance
from ddpo.basics.tensors import expand_like, mean_per_row

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_ERROR = 1e-5


class Nft(Matching):
    """DiffusionNFT: samples of the old weights, trained without guidance and log-probs."""

    type: Literal["nft"]
    beta: PositiveFloat = 1.0
    """How far positive and negative predictions lie apart. Published: 1, and 0.1 for OCR and
    several rewards. The smaller, the further a sample moves the policy."""
    kl_weight: NonNegativeFloat = 1e-4
    """Weight of the squared distance from the base model's prediction. Above 0, an update costs one
    more forward per noised sample."""
    adaptive: bool = True
    """Divide each squared error by its mean absolute error, so that no time dominates."""
    old_decay: AnyDecay = PUBLISHED_SCHEDULES["half"]
    """How the old weights, which draw the samples, follow the trained ones: `on_policy`, `half` or
    `late` (DiffusionNFT's decay types 0, 1 and 2), or `{after, per_step, most}`."""
    steps_share: float = Field(default=0.99, gt=0.0, le=1.0)
    """Share of the sampler's steps, from the noisiest one, whose times are trained; rounded down,
    but at least one."""

    @property
    def needs(self) -> Needs:
        """Final latents of the old weights; these, and the base model for the KL penalty."""
        policies = {"old", "base"} if self.kl_weight else {"old"}
        return Needs("final_latents", frozenset(policies), samples_from="old")

    @property
    def times(self) -> Times:
        """Those of the sampler's steps but the cleanest."""
        return Times("sampler", share=self.steps_share)

    def decay_of_old(self, updates: int) -> float:
        """Return d of the schedule."""
        return self.old_decay.at(updates)

    def losses(self, batch: DenoisingBatch) -> Tensor:
        """Return the policy loss of each noised sample [N], plus the weighted KL penalty."""
        losses = self.policy_losses(batch)
        if self.kl_weight:
            losses = losses + self.kl_weight * squared_distance(
                batch.prediction, batch.others["base"]
            )
        return losses

    def policy_losses(self, batch: DenoisingBatch) -> Tensor:
        """Return the loss of each noised sample [N] without the KL penalty."""
        new, old, clip = batch.prediction, batch.others["old"], self.advantages.clip
        advantages = batch.credit["advantage"].to(new)
        better = (advantages.clamp(-clip, clip) / clip / 2 + 0.5).clamp(0, 1)
        positive = self.errors(batch, self.beta * new + (1 - self.beta) * old)
        negative = self.errors(batch, (1 + self.beta) * old - self.beta * new)
        return (better * positive + (1 - better) * negative) / self.beta * clip

    def errors(self, batch: DenoisingBatch, prediction: Tensor) -> Tensor:
        """Return the squared error of the clean latents that a prediction implies.

        Args:
            batch: N noised samples.
            prediction: [N, ...], of them.

        Returns:
            [N], means over latent dimensions, divided by the mean absolute error if `adaptive`.
        """
        deviation = batch.clean_from(prediction) - batch.clean
        if not self.adaptive:
            return mean_per_row(deviation**2)
        size = mean_per_row(deviation.detach().abs()).clamp(min=_LEAST_ERROR)
        return mean_per_row(deviation**2 / expand_like(size, deviation))
