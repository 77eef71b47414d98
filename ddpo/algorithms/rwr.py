"""Reward-weighted regression: RWR and RWR-sparse (arXiv 2305.13301, section 4.1).

The loss that diffusion models are trained with, on the model's own final latents, weighted by their
rewards. As published: 10,240 final latents per epoch, 10 epochs; RWR makes 5 passes over them,
RWR-sparse 50 passes over the best 1,024, which is as many gradient steps.

A sample of weight 0 is not trained on. Failed samples (reward NaN) have weight 0 or, imputed, count
as their prompt's mean. Shapes: S samples of an epoch, N samples of one forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from ddpo.algorithms.base import (
    Credit,
    PromptStatistics,
    RunSettings,
    Scored,
    imputed_rewards,
    require_a_reward,
)
from ddpo.algorithms.denoising import DenoisingAlgorithm, DenoisingBatch
from ddpo.basics.tensors import mean_per_row

if TYPE_CHECKING:
    from torch import Tensor


class Regression(DenoisingAlgorithm):
    """What both algorithms share: weights, and the loss."""

    columns: ClassVar[Mapping[str, str]] = {"weight": "float32"}

    def check_run(self, run: RunSettings) -> None:
        """Accept any run: deterministic sampling and stored final latents are enough."""

    def credit(self, scored: Scored, statistics: PromptStatistics) -> Credit:
        """Turn an epoch's rewards into weights; the statistics stay as they are."""
        rewards = scored.rewards
        require_a_reward(rewards)
        counted = imputed_rewards(scored.prompts, rewards, {}) if scored.impute else rewards
        known = np.isfinite(counted)
        weights = np.zeros(len(rewards))
        count = np.zeros(len(rewards), dtype=np.int64)
        for rows in rows_by_name(self.compared(scored.prompts), known):
            weights[rows] = self.weights(counted[rows])
            count[rows] = len(rows)
        return Credit({"weight": weights}, count, known & ~np.isfinite(rewards), statistics)

    def compared(self, prompts: Sequence[str]) -> Sequence[str]:
        """Return a name per sample; samples of equal names are weighted among each other."""
        return prompts

    @abstractmethod
    def weights(self, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the weights [N], at least 0, of samples that are weighted among each other."""

    def trained(self, credit: Mapping[str, Tensor]) -> list[int]:
        """Return the samples whose weight is above 0."""
        return (credit["weight"] > 0).nonzero().flatten().tolist()

    def losses(self, batch: DenoisingBatch) -> Tensor:
        """Return w ||prediction - target||² / (number of latent dimensions), [N]."""
        errors = mean_per_row((batch.prediction - batch.target) ** 2)
        return batch.credit["weight"].to(errors) * errors

    def credit_metrics(
        self, credit: Mapping[str, Tensor], samples_per_prompt: int
    ) -> dict[str, float]:
        """Return how unequal the weights are.

        ``weight_max`` is the largest weight, where the mean over samples that share a softmax is 1;
        ``trained_samples`` the samples of weight above 0; ``effective_sample_size`` (sum w)² / sum
        w² (Kish), the number of equally weighted samples that would vary as much: near 1, training
        collapses onto a single image.
        """
        weights = credit["weight"].double()
        return {
            "weight_max": float(weights.max()),
            "trained_samples": int((weights > 0).sum()),
            "effective_sample_size": float(weights.sum() ** 2 / (weights**2).sum()),
        }


class Rwr(Regression):
    """RWR: the denoising loss on the model's own final latents, weighted by N softmax(beta r)."""

    type: Literal["rwr"]
    beta: float = Field(default=0.2, ge=0.0)
    """Inverse temperature of the softmax, per unit of reward. The higher, the fewer samples count;
    0 weights all alike, a control that learns nothing of the reward."""
    weights_over: Literal["data_set", "prompt"] = "data_set"
    """What shares a softmax: all samples of the epoch, or those of a prompt (as published for the
    aesthetic task), so that no easy prompt outweighs the others."""
    inner_epochs: PositiveInt = 5
    """Passes over an epoch's samples, each with its own order, noise and timesteps."""
    updates_per_epoch: PositiveInt = 20
    """Optimizer steps per epoch, over all passes together: each sees
    samples_per_epoch * inner_epochs / updates_per_epoch samples."""

    def check_run(self, run: RunSettings) -> None:
        """Check that the steps of a pass are of equal size."""
        self.check_passes(run)

    def compared(self, prompts: Sequence[str]) -> Sequence[str]:
        """Return the prompts, or one name for all where the whole epoch shares a softmax."""
        return [""] * len(prompts) if self.weights_over == "data_set" else prompts

    def weights(self, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return n softmax(beta r), of mean 1."""
        return scaled_softmax(self.beta * rewards)


class RwrSparse(Regression):
    """RWR-sparse: the denoising loss on the best final latents of each prompt, unweighted."""

    type: Literal["rwr_sparse"]
    keep: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of each prompt's samples that is kept, rounded down, but at least one sample."""
    inner_epochs: PositiveInt = 50
    """Passes over the kept samples, each with its own order, noise and timesteps."""
    updates_per_epoch: PositiveInt = 50
    """Optimizer steps per epoch, over all passes together: a multiple of inner_epochs. A pass with
    fewer samples than steps takes one step per sample."""

    def weights(self, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return 1 for the best share, 0 for the rest; of equal rewards the first ones win."""
        # In decimals, as the config says it: 0.29 of 100 samples are 29, and not 28.999.
        number = max(int(Fraction(str(self.keep)) * len(rewards)), 1)
        weights = np.zeros(len(rewards))
        weights[np.argsort(-rewards, kind="stable")[:number]] = 1.0
        return weights


def rows_by_name(names: Sequence[str], known: NDArray[np.bool_]) -> Iterator[NDArray[np.intp]]:
    """Yield the rows of each name that have a reward, in their order."""
    array = np.asarray(names)
    for name in dict.fromkeys(array[known].tolist()):
        yield np.flatnonzero((array == name) & known)


def scaled_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return n softmax(logits), of mean 1; the largest is subtracted first, so none overflows."""
    weights = np.exp(logits - logits.max())
    return weights / weights.mean()
