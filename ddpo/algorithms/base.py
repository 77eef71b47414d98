"""What an algorithm is: one class whose fields are its config and whose methods are its rules.

Shapes: S samples of an epoch, N items of one forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ddpo.basics.part import Part
from ddpo.errors import RewardError

if TYPE_CHECKING:
    from torch import Tensor

Data = Literal["trajectories", "final_latents"]
"""What training reads of a sample: all latents and log-probs, or the clean latents alone."""

Sampling = Literal["trained", "old"]
"""The weights that draw an epoch's samples: those that are trained, or a moving average of them."""

PromptStatistics = Mapping[str, tuple[float, ...]]
"""The most recent rewards of each prompt, oldest first."""


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs beside the policy that it trains."""

    data: Data
    """What it trains on."""
    policies: frozenset[str] = frozenset()
    """Other weight sets that a forward is also computed with: "base", "old" or "start", the trained
    weights before the epoch."""
    samples_from: Sampling = "trained"
    """The weight set that draws the samples."""
    old_means: bool = False
    """Whether the update also reads each step's mean under the policy that sampled. Those are
    computed before the epoch's first step, together with the old log-probs."""
    samples_per_loss: int = 1
    """How many samples one loss compares: consecutive ones of an update, which share their times
    and noise, and are in one forward. Micro-batches are multiples of it."""

    @property
    def keeps_old(self) -> bool:
        """Whether the state has old weights, which follow the trained ones once an epoch."""
        return self.samples_from == "old" or "old" in self.policies


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run, outside the algorithm, that may contradict it."""

    samples_per_epoch: int
    samples_per_prompt: int
    deterministic_because: str | None
    """Why sampling draws no noise, so that steps have no log-probs, with the way out; None if it
    draws some."""
    final_latents_only: bool
    """Whether the config says to store nothing but final latents."""
    keeps_base_model: bool
    """Whether the base model's weights remain available during training, as with adapters."""
    off_policy: str | None
    """The setting by which the run trains on samples of another policy; None if there is none."""
    samples_ahead: bool = False
    """Whether samples come from weights that are one epoch older, in every epoch."""
    log_probs_are_densities: bool = True
    """Whether log-probs are log-densities, and not squared distances alone."""


@dataclass(frozen=True)
class ScoredPart:
    """One reward of a sum whose parts are normalised before they are summed."""

    weight: float
    """Of its advantages in the sum."""
    rewards: NDArray[np.float64]
    """[S]; NaN where scoring failed."""


@dataclass(frozen=True)
class Scored:
    """The samples of one epoch with their rewards, in the order of ``sample_id``."""

    prompts: Sequence[str]
    """S prompts."""
    rewards: NDArray[np.float64]
    """[S]; NaN where scoring failed."""
    samples_per_prompt: int = 1
    """How many consecutive samples form a group, which shares a prompt."""
    impute: bool = False
    """Whether failed samples count as their prompt's mean, where the prompt has one."""
    shuffle_seed: int = 0
    """Seed of the permutation that a shuffled control experiment applies."""
    parts: Sequence[ScoredPart] = ()
    """What ``rewards`` is a sum of, where each is to be normalised in its group; else empty."""


@dataclass(frozen=True)
class Credit:
    """What each sample of an epoch is worth to the update."""

    columns: Mapping[str, NDArray[np.float64]]
    """[S] each, by the names in :attr:`Algorithm.columns`."""
    count: NDArray[np.int64]
    """[S], the number of rewards that a sample's was compared with."""
    imputed: NDArray[np.bool_]
    """[S], samples without a reward that count as their prompt's mean."""
    statistics: PromptStatistics
    """Prompt statistics that the next epoch starts from."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step sees."""

    samples: Sequence[int]
    """Rows of the epoch's samples."""
    inner_epoch: int = 0
    """The pass over the epoch's samples that the step belongs to."""


class Algorithm(Part, ABC):
    """An algorithm: how rewards become credit, and credit becomes a loss."""

    columns: ClassVar[Mapping[str, str]]
    """Columns of the stored credit table, with their Arrow types."""

    type: Any
    """The algorithm's name."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What training by this algorithm reads and computes."""

    @property
    def has_prompt_statistics(self) -> bool:
        """Whether credit depends on rewards of earlier epochs."""
        return False

    @property
    def has_value_function(self) -> bool:
        """Whether a value function is trained beside the policy."""
        return False

    @property
    def compares_groups(self) -> bool:
        """Whether credit compares a sample with its group."""
        return False

    @property
    def labels(self) -> dict[str, str]:
        """What identifies the algorithm at a glance, for a tracking page."""
        return {"algorithm": self.type}

    def decay_of_old(self, updates: int) -> float:
        """Return d of ``old = d old + (1 - d) trained``, for an algorithm that keeps old weights.

        Args:
            updates: Optimizer steps so far, those of the epoch that just ended included.
        """
        return 0.0

    def off_policy(self) -> Algorithm:
        """Return the algorithm with settings that hold for samples of another policy."""
        return self

    @abstractmethod
    def check_run(self, run: RunSettings) -> None:
        """Check that the rest of a run's config fits the algorithm.

        Raises:
            ValueError: It does not; says what is wrong, and after a semicolon the way out.
        """

    def check_reward(self, *, normalises_by_group: bool) -> None:
        """Check that credit can be computed from a reward.

        Args:
            normalises_by_group: Whether it is a sum whose parts are normalised each in its group.

        Raises:
            ValueError: It is, and the algorithm has no groups.
        """
        if normalises_by_group and not self.compares_groups:
            raise ValueError(
                "the reward is a weighted sum with `normalise: group`, which normalises each of "
                "its rewards in the sample's group, and the algorithm compares samples with "
                "others; set `algorithm.advantages: {type: group}` and "
                "rollouts.samples_per_prompt to at least 2, or remove `normalise`"
            )

    @abstractmethod
    def credit(self, scored: Scored, statistics: PromptStatistics) -> Credit:
        """Turn an epoch's rewards into credit.

        Args:
            scored: The epoch's samples.
            statistics: The rewards that earlier epochs left.

        Raises:
            RewardError: No sample has a reward.
        """

    @abstractmethod
    def updates(
        self, credit: Mapping[str, Tensor], *, run_seed: int, epoch: int
    ) -> Sequence[Update]:
        """Return the optimizer steps of an epoch, in order.

        Args:
            credit: The epoch's credit table: ``reward`` and :attr:`columns`, [S] each.
            run_seed: The config's ``seed``.
            epoch: The epoch.

        Returns:
            The steps; none where there is nothing to learn from.
        """

    def credit_of_all(self, count: int) -> dict[str, Tensor]:
        """Return a credit table by which all samples are trained on, for a dry run.

        Args:
            count: How many they are, a multiple of `Needs.samples_per_loss`.
        """
        import torch

        return {name: torch.ones(count) for name in ("reward", *self.columns)}

    @abstractmethod
    def losses(self, batch: Any) -> Tensor:
        """Return the loss of each item of a forward.

        Args:
            batch: N items, of the type that belongs to :attr:`needs`: a
                :class:`~ddpo.algorithms.policy_gradient.PairBatch` or a
                :class:`~ddpo.algorithms.denoising.DenoisingBatch`.

        Returns:
            [N], with a gradient; an optimizer step minimises the mean over all its items. Items
            that one loss compares have that loss each.
        """

    def credit_metrics(
        self, credit: Mapping[str, Tensor], samples_per_prompt: int
    ) -> dict[str, float]:
        """Return what is worth showing of an epoch's credit, by name.

        Args:
            credit: The epoch's credit table: ``reward`` and :attr:`columns`, [S] each.
            samples_per_prompt: The size of a group.
        """
        return {}


def require_a_reward(rewards: NDArray[np.float64]) -> None:
    """Check that an epoch has at least one finite reward.

    Args:
        rewards: [S]; NaN where scoring failed.

    Raises:
        RewardError: No sample has a reward.
    """
    if not np.isfinite(rewards).any():
        raise RewardError(
            f"none of the {len(rewards)} samples of this epoch has a finite reward, so there is "
            "nothing to learn from; look at the status column of the epoch's rewards"
        )


def imputed_rewards(
    prompts: Sequence[str], rewards: NDArray[np.float64], statistics: PromptStatistics
) -> NDArray[np.float64]:
    """Replace failed rewards by the prompt's mean.

    Args:
        prompts: S prompts.
        rewards: [S]; NaN where scoring failed.
        statistics: Remembered rewards; a prompt without any takes its mean of this epoch.

    Returns:
        [S]; still NaN where a prompt has no reward at all.
    """
    names = np.asarray(prompts)
    whole = rewards.copy()
    for prompt in dict.fromkeys(names[~np.isfinite(rewards)].tolist()):
        rows = names == prompt
        known = np.asarray(statistics.get(prompt, ())) if prompt in statistics else rewards[rows]
        known = known[np.isfinite(known)]
        if len(known):
            whole[rows & ~np.isfinite(rewards)] = known.mean()
    return whole
