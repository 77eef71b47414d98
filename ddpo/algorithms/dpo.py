"""Online Diffusion-DPO: prefer the better of two images of a prompt (arXiv 2311.12908, eq. 14).

The pairs are made of an epoch's own samples, by their rewards. Both samples of a pair are noised at
the same time with the same noise, and the policy is compared with the base model, which is frozen:

    l          = |v - v*|², a mean over latent dimensions, v* being the target
    model_diff = l_better - l_worse,   ref_diff alike with the base model's predictions
    loss       = -log sigmoid(-beta / 2 (model_diff - ref_diff)), a mean over pairs

Shapes: S samples of an epoch, N noised samples of one forward, N / 2 pairs of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from ddpo.algorithms.advantages import GroupAdvantages
from ddpo.algorithms.base import (
    Credit,
    Needs,
    PromptStatistics,
    RunSettings,
    Scored,
    require_a_reward,
)
from ddpo.algorithms.denoising import DenoisingAlgorithm, DenoisingBatch
from ddpo.basics.tensors import mean_per_row

if TYPE_CHECKING:
    from torch import Tensor

_NO_CLIP = 1e30


class Dpo(DenoisingAlgorithm):
    """Diffusion-DPO on pairs of a group's samples, of which the reward says what is better."""

    columns: ClassVar[Mapping[str, str]] = {"pair": "int32", "preferred": "int32"}

    type: Literal["dpo"]
    beta: PositiveFloat = 5000.0
    """How strongly the policy is held to the base model: the larger, the smaller the change of
    denoising errors that counts as a preference learned. Published: 5000 for saved preferences; 100
    to 2000 where pairs are made of the policy's own samples."""
    pairing: Literal["best_worst", "margin"] = "best_worst"
    """`best_worst`: the best sample of each group and its worst. `margin`: also the second best and
    the second worst, and so on, while their rewards differ by at least `least_margin`."""
    least_margin: NonNegativeFloat = 0.0
    """Least difference of the rewards of a pair. Samples of equal rewards are never a pair."""
    inner_epochs: PositiveInt = 1
    """Passes over an epoch's pairs, each with its own order, noise and times."""
    updates_per_epoch: PositiveInt = 1
    """Optimizer steps per epoch, over all passes together: a multiple of inner_epochs. A pass with
    fewer pairs than steps takes one step per pair."""
    shuffle: bool = False
    """Control experiment: permute the rewards within each group, so that nothing can be learned
    from them."""

    @property
    def needs(self) -> Needs:
        """Final latents, in pairs, and what the base model predicts of them."""
        return Needs("final_latents", frozenset({"base"}), samples_per_loss=2)

    @property
    def compares_groups(self) -> bool:
        """Pairs are of one group."""
        return True

    def check_run(self, run: RunSettings) -> None:
        """Check that groups have pairs, and that there is a base model to compare with."""
        if run.samples_per_prompt == 1:
            raise ValueError(
                "algorithm.type is dpo and rollouts.samples_per_prompt is 1: both samples of a "
                "pair share a prompt, and no sample has another one beside it; set "
                "rollouts.samples_per_prompt to at least 2"
            )
        if not run.keeps_base_model:
            raise ValueError(
                "algorithm.type is dpo with `trainable: full`: its reference is the base model, "
                "which is what remains when the adapter is switched off, and full fine-tuning has "
                "no adapter; set `trainable: {type: lora}`"
            )

    def credit(self, scored: Scored, statistics: PromptStatistics) -> Credit:
        """Turn an epoch's rewards into pairs; the statistics stay as they are.

        Returns:
            Columns ``pair``, the number of a sample's pair or -1, and ``preferred``, 1 for the
            better sample of each pair and 0 for all others. A sample that could not be scored has
            no pair, imputed or not.
        """
        require_a_reward(scored.rewards)
        rewards = _comparable(scored)
        total, size = len(rewards), scored.samples_per_prompt
        pair, preferred = np.full(total, -1.0), np.zeros(total)
        count = np.zeros(total, dtype=np.int64)
        order = np.random.default_rng(scored.shuffle_seed)
        made = 0
        for start in range(0, total, size):
            rows = start + np.flatnonzero(np.isfinite(rewards[start : start + size]))
            count[rows] = len(rows)
            own = order.permutation(rewards[rows]) if self.shuffle else rewards[rows]
            for better, worse in self.pairs(own):
                pair[rows[[better, worse]]], preferred[rows[better]] = made, 1.0
                made += 1
        unknown = np.zeros(total, dtype=np.bool_)
        return Credit({"pair": pair, "preferred": preferred}, count, unknown, statistics)

    def pairs(self, rewards: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
        """Yield the pairs of a group, each sample in one at most, the most different ones first.

        Args:
            rewards: [n], of samples that could be scored.

        Yields:
            The better and the worse sample's index. Of equal rewards, the first is the best and the
            last the worst.
        """
        order = np.argsort(-rewards, kind="stable")
        most = 1 if self.pairing == "best_worst" else len(order) // 2
        for better, worse in zip(order[:most].tolist(), order[::-1].tolist(), strict=False):
            margin = rewards[better] - rewards[worse]
            if margin <= 0 or margin < self.least_margin:
                return
            yield better, worse

    def trained(self, credit: Mapping[str, Tensor]) -> list[int]:
        """Return the samples that have a pair, pair by pair, the better one first."""
        rows = (credit["pair"] >= 0).nonzero().flatten()
        order = 2 * credit["pair"][rows].double() - credit["preferred"][rows].double()
        return rows[order.argsort()].tolist()

    def credit_of_all(self, count: int) -> dict[str, Tensor]:
        """Return a credit table of neighbours that are pairs; see `Algorithm.credit_of_all`."""
        import torch

        numbers = torch.arange(count)
        return {
            **super().credit_of_all(count),
            "pair": (numbers // 2).float(),
            "preferred": 1.0 - numbers % 2,
        }

    def losses(self, batch: DenoisingBatch) -> Tensor:
        """Return the loss of each noised sample [N]: both samples of a pair have that of the pair.

        Their mean is then the mean over pairs.
        """
        from torch.nn.functional import logsigmoid

        return -logsigmoid(self.margins(batch)).repeat_interleave(2)

    def margins(self, batch: DenoisingBatch) -> Tensor:
        """Return -beta / 2 (model_diff - ref_diff) of each pair, [N / 2].

        That is the logit of the preference: above 0 where, relative to the base model, the policy
        denoises the better sample better than the worse one.
        """
        changes = _errors(batch, batch.prediction) - _errors(batch, batch.others["base"])
        better, worse = changes.unflatten(0, (-1, 2)).unbind(1)
        return -self.beta / 2 * (better - worse)

    @property
    def measured(self) -> tuple[str, ...]:
        """``implicit_accuracy`` and ``implicit_margin``."""
        return ("implicit_accuracy", "implicit_margin")

    def measures(self, batch: DenoisingBatch) -> Mapping[str, Tensor]:
        """Return which pairs have model_diff < ref_diff, and the margins; [N] each."""
        margins = self.margins(batch).detach().repeat_interleave(2)
        return {"implicit_accuracy": (margins > 0).to(margins), "implicit_margin": margins}

    def credit_metrics(
        self, credit: Mapping[str, Tensor], samples_per_prompt: int
    ) -> dict[str, float]:
        """Return the number of ``pairs``, and ``reward_margin``, by how much their rewards differ.

        Without any pair there is no margin.
        """
        rows = self.trained(credit)
        if not rows:
            return {"pairs": 0}
        rewards = credit["reward"][rows].double()
        margin = float((rewards[::2] - rewards[1::2]).mean())
        return {"pairs": len(rows) // 2, "reward_margin": margin}


def _errors(batch: DenoisingBatch, prediction: Tensor) -> Tensor:
    """Return the mean squared error of each prediction, [N]."""
    return mean_per_row((prediction - batch.target) ** 2)


def _comparable(scored: Scored) -> NDArray[np.float64]:
    """Return the rewards [S] that samples are compared by, NaN where scoring failed.

    Of a sum whose parts are normalised in their group, this is the sum of the normalised parts.
    """
    if not scored.parts:
        return scored.rewards
    groups = GroupAdvantages(type="group", clip=_NO_CLIP)
    moments, _ = groups.moments(scored, {})
    sums = groups.normalised(scored, scored.rewards, moments)
    return np.where(np.isfinite(scored.rewards), sums, np.nan)
