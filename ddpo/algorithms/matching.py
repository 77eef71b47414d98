"""What NFT and AWM share: advantages weigh how well final latents are matched.

Shapes: N noised samples of one forward, latents of any shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from ddpo.algorithms.advantages import AnyAdvantages, GroupAdvantages
from ddpo.algorithms.base import Credit, PromptStatistics, RunSettings, Scored
from ddpo.algorithms.denoising import DenoisingAlgorithm, DenoisingBatch
from ddpo.algorithms.kl import check_kl_weight
from ddpo.basics.part import Part
from ddpo.basics.tensors import mean_per_row

if TYPE_CHECKING:
    from torch import Tensor


class DecaySchedule(Part):
    """How old weights follow the trained ones, once an epoch: old = d old + (1 - d) trained.

    d = min(per_step (u - after), most) after u optimizer steps, and 0 before step `after`. With
    d = 0 they equal the trained ones.
    """

    after: NonNegativeInt = 0
    """Optimizer steps during which d is 0."""
    per_step: NonNegativeFloat = 0.001
    """What an optimizer step adds to d."""
    most: float = Field(default=0.5, ge=0.0, lt=1.0)
    """The largest d."""

    def at(self, updates: int) -> float:
        """Return d after so many optimizer steps."""
        return max(min(self.per_step * (updates - self.after), self.most), 0.0)


PUBLISHED_SCHEDULES: Mapping[str, DecaySchedule] = {
    "on_policy": DecaySchedule(per_step=0.0, most=0.0),
    "half": DecaySchedule(after=0, per_step=0.001, most=0.5),
    "late": DecaySchedule(after=75, per_step=0.0075, most=0.999),
}
"""DiffusionNFT's decay types 0, 1 and 2, by the names that a config may use."""


def _by_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in PUBLISHED_SCHEDULES:
        names = ", ".join(PUBLISHED_SCHEDULES)
        raise ValueError(f"{value!r} is not a schedule; use {names}, or {{after, per_step, most}}")
    return PUBLISHED_SCHEDULES[value]


AnyDecay = Annotated[DecaySchedule, BeforeValidator(_by_name)]
"""A schedule, or the name of a published one."""


class Matching(DenoisingAlgorithm):
    """An algorithm whose advantages say how strongly each final latent is matched."""

    columns: ClassVar[Mapping[str, str]] = {
        "advantage": "float32",
        "mean": "float64",
        "std": "float64",
    }

    advantages: AnyAdvantages = GroupAdvantages(type="group", deviation="batch")
    """How rewards become advantages; relative to the group, over the whole epoch's standard
    deviation, as published."""
    inner_epochs: PositiveInt = 1
    """Passes over an epoch's samples, each with its own order, noise and times."""
    updates_per_epoch: PositiveInt = 1
    """Optimizer steps per epoch, over all passes together."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance from the base model's prediction. Above 0, an update costs one
    more forward per noised sample."""

    @model_validator(mode="after")
    def _advantages_need_no_trajectory(self) -> Matching:
        if self.advantages.critic is not None:
            raise ValueError(
                f"advantages.type is {self.advantages.type}: its value function is of the steps of "
                f"a trajectory, and {self.type} trains on final latents alone; use group, "
                "per_prompt, leave_one_out or batch"
            )
        return self

    @property
    def has_prompt_statistics(self) -> bool:
        """Whether the advantages remember rewards of earlier epochs."""
        return self.advantages.has_prompt_statistics

    @property
    def labels(self) -> dict[str, str]:
        """The algorithm's name and the advantages'."""
        return {"algorithm": self.type, "advantages": self.advantages.type}

    def check_run(self, run: RunSettings) -> None:
        """Check that updates are of equal size, and that what the loss refers to is there."""
        self.check_passes(run)
        check_kl_weight(self.kl_weight, run)
        self.advantages.check_groups(run.samples_per_prompt)

    def credit(self, scored: Scored, statistics: PromptStatistics) -> Credit:
        """Turn an epoch's rewards into advantages."""
        return self.advantages.compute(scored, statistics)

    def credit_metrics(
        self, credit: Mapping[str, Tensor], samples_per_prompt: int
    ) -> dict[str, float]:
        """Return what the kind of advantage reports."""
        return self.advantages.metrics(credit, samples_per_prompt)

    @property
    def measured(self) -> tuple[str, ...]:
        """``distance_to_base`` and ``distance_to_old``, where they are computed."""
        return tuple(f"distance_to_{name}" for name in self._distances)

    @property
    def _distances(self) -> list[str]:
        return [name for name in ("base", "old") if name in self.needs.policies]

    def measures(self, batch: DenoisingBatch) -> Mapping[str, Tensor]:
        """Return the squared distances from other predictions."""
        return {
            f"distance_to_{name}": squared_distance(batch.prediction.detach(), batch.others[name])
            for name in self._distances
        }


def squared_distance(prediction: Tensor, other: Tensor) -> Tensor:
    """Return the squared distance of two tensors [N, ...], a mean over latent dimensions [N]."""
    return mean_per_row((prediction - other) ** 2)
