"""What DDPO's policy gradients share (arXiv 2305.13301, section 4.2).

Their loss is a mean over (sample, timestep) pairs. Shapes: S samples of an epoch, T denoising
steps, N pairs of one forward, latents of any shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field, NonNegativeFloat, PositiveInt

from ddpo.algorithms.advantages import AnyAdvantages, PerPromptAdvantages
from ddpo.algorithms.base import (
    Algorithm,
    Credit,
    Needs,
    PromptStatistics,
    RunSettings,
    Scored,
    Update,
)
from ddpo.algorithms.kl import check_kl_weight, gaussian_kl
from ddpo.algorithms.step_weighting import StepScales, equal_variance
from ddpo.basics.part import check_divides, is_none, is_off

if TYPE_CHECKING:
    from torch import Tensor


class Gaussian(Protocol):
    """Normal(mean, std² I), one per pair: the distribution of a pair's next latents."""

    @property
    def mean(self) -> Tensor:
        """[N, ...], of the latents' shape."""
        ...

    @property
    def std(self) -> Tensor:
        """[N, 1, ...], broadcast against the mean."""
        ...

    @property
    def divergence_std(self) -> Tensor:
        """[N, 1, ...], broadcast against the mean: what KL penalties divide by."""
        ...


@dataclass(frozen=True)
class PairBatch:
    """The (sample, timestep) pairs of one forward."""

    log_probs: Tensor
    """[N], of the policy being updated, with a gradient."""
    old_log_probs: Tensor
    """[N], of the policy that sampled."""
    advantages: Tensor
    """[N]."""
    current: Gaussian
    """The step under the policy being updated, with a gradient."""
    base: Gaussian | None = None
    """The step under the base model, where the algorithm needs it."""
    old_mean: Tensor | None = None
    """[N, ...], the step's mean under the policy that sampled, where the algorithm needs it."""
    step_weights: Tensor | None = None
    """[N], what the algorithm weighs the loss of each pair's step by, if it does."""

    @cached_property
    def kl_to_old(self) -> Tensor:
        """[N], the KL divergence of the step from the sampling policy's, with a gradient."""
        assert self.old_mean is not None, "the algorithm does not say that it needs old means"
        return gaussian_kl(self.current.mean, self.old_mean, self.current.std)

    @cached_property
    def kl_to_base(self) -> Tensor:
        """[N], the KL divergence of the step from the base model's, with a gradient."""
        assert self.base is not None, "the algorithm does not list base among the policies it needs"
        return gaussian_kl(self.current.mean, self.base.mean, self.current.divergence_std)


class PolicyGradient(Algorithm):
    """A policy gradient: rewards become advantages, advantages weigh log-probs."""

    columns: ClassVar[Mapping[str, str]] = {
        "advantage": "float32",
        "mean": "float64",
        "std": "float64",
    }

    advantages: AnyAdvantages = PerPromptAdvantages()
    """How rewards become advantages."""
    updates_per_epoch: PositiveInt = 4
    """Optimizer steps per epoch; each sees samples_per_epoch / updates_per_epoch samples."""
    kl_weight: NonNegativeFloat = Field(default=0.0, exclude_if=is_off)
    """Weight of the KL penalty towards the base model. Above 0, an update costs one more forward
    per pair."""

    step_weighting: Literal["none", "variance"] = Field(default="none", exclude_if=is_none)
    """How the steps of a trajectory are weighed against each other in the policy loss. `none`: all
    alike, as published, so that steps of little noise dominate the gradient. `variance`: so that
    the scores of all trained steps have the same variance."""

    @property
    def needs(self) -> Needs:
        """Whole trajectories; and the base model for the KL penalty."""
        return Needs("trajectories", frozenset({"base"} if self.kl_weight else ()))

    @property
    def has_prompt_statistics(self) -> bool:
        """Whether the advantages remember rewards of earlier epochs."""
        return self.advantages.has_prompt_statistics

    @property
    def has_value_function(self) -> bool:
        """Whether the advantages subtract a learned value function."""
        return self.advantages.critic is not None

    @property
    def compares_groups(self) -> bool:
        """Whether the advantages are relative to a sample's group."""
        return self.advantages.compares_groups

    @property
    def labels(self) -> dict[str, str]:
        """The algorithm's name and the advantages'."""
        return {"algorithm": self.type, "advantages": self.advantages.type}

    @property
    def tolerated_deviation(self) -> float:
        """How far the initial importance ratio may be from 1 before it is recomputed.

        The 99th percentile of |rho - 1|, before any update, that rounding may cause. Beyond it the
        old log-probs are recomputed in the update's own graph: 0 is always, infinity never.
        """
        return float("inf")

    def ratio_metrics(self, ratio: Tensor) -> dict[str, float]:
        """Return what the algorithm's loss did to the importance ratios of an epoch.

        Args:
            ratio: [S, trained steps] float64.
        """
        return {"clip_fraction": 0.0}

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what :meth:`measured` returns."""
        return ("kl_to_base",) if self.kl_weight else ()

    def measured(self, batch: PairBatch) -> tuple[Tensor, ...]:
        """Return what is worth showing of a forward, [N] each, without gradients.

        Epochs show the means over all their pairs.
        """
        return (batch.kl_to_base.detach(),) if self.kl_weight else ()

    def step_weights(self, scales: StepScales) -> Tensor | None:
        """Return what the policy loss of each step is multiplied by; None for 1.

        Args:
            scales: Of the K steps that an epoch trains.

        Returns:
            [K]; of mean 1 with ``step_weighting: variance``.
        """
        return equal_variance(scales) if self.step_weighting == "variance" else None

    def check_run(self, run: RunSettings) -> None:
        """Check that there is something to train on, and that updates are of equal size."""
        check_divides(
            "algorithm.updates_per_epoch",
            self.updates_per_epoch,
            "samples_per_epoch",
            run.samples_per_epoch,
        )
        if run.deterministic_because is not None:
            raise ValueError(run.deterministic_because)
        if run.final_latents_only:
            raise ValueError(
                f"rollouts.store_trajectories is final, but {self.type} trains on every "
                "step of a trajectory; leave it at auto, or use `type: rwr` or `type: rwr_sparse`"
            )
        check_kl_weight(self.kl_weight, run)
        self.advantages.check_groups(run.samples_per_prompt)

    def credit(self, scored: Scored, statistics: PromptStatistics) -> Credit:
        """Turn an epoch's rewards into advantages."""
        return self.advantages.compute(scored, statistics)

    def updates(
        self, credit: Mapping[str, Tensor], *, run_seed: int, epoch: int
    ) -> Sequence[Update]:
        """Cut the trained samples into updates of consecutive ones.

        Prompts and noise are drawn independently, so any order is a random one. Their sizes are
        equal where all samples are trained on; else they differ by at most 1, and where there are
        fewer samples than updates, each has one.
        """
        rows = self.advantages.trained(credit)
        number = min(self.updates_per_epoch, len(rows))
        ends = [len(rows) * n // number for n in range(number + 1)]
        return [Update(rows[start:end]) for start, end in pairwise(ends)]

    def losses(self, batch: PairBatch) -> Tensor:
        """Return the policy loss of each pair [N], weighed by step, plus the KL penalty."""
        losses = self.policy_losses(batch)
        if batch.step_weights is not None:
            losses = losses * batch.step_weights
        return losses + self.kl_weight * batch.kl_to_base if self.kl_weight else losses

    @abstractmethod
    def policy_losses(self, batch: PairBatch) -> Tensor:
        """Return the loss of each pair [N] without its step's weight and the KL penalty."""

    def credit_metrics(
        self, credit: Mapping[str, Tensor], samples_per_prompt: int
    ) -> dict[str, float]:
        """Return what the kind of advantage reports."""
        return self.advantages.metrics(credit, samples_per_prompt)
