"""How rewards become advantages, and advantages become gradients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ddpo.basics.part import Part, is_off
from ddpo.config.regression import RwrConfig, RwrSparseConfig


class PerPromptAdvantages(Part):
    """Advantage = (reward - mean) / std of the prompt's own last rewards (paper, section 4.3)."""

    type: Literal["per_prompt"] = "per_prompt"
    buffer_size: PositiveInt = 16
    """Rewards that are remembered for each prompt."""
    min_count: PositiveInt = 16
    """A prompt with fewer remembered rewards is normalised by the whole batch instead."""
    clip: PositiveFloat = 5.0
    """Advantages are clipped to plus and minus this: 5 with LoRA, 10 with the whole UNet."""
    shuffle: bool = False
    """Control experiment: deal the advantages to random samples. Nothing can be learned then."""

    @model_validator(mode="after")
    def _buffer_can_reach_min_count(self) -> PerPromptAdvantages:
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"min_count {self.min_count} is never reached by a buffer of {self.buffer_size}, "
                "so per-prompt statistics would never be used; "
                f"set min_count to at most {self.buffer_size}"
            )
        return self


class BatchAdvantages(Part):
    """Advantage = (reward - mean) / std over the whole epoch."""

    type: Literal["batch"]
    clip: PositiveFloat = 5.0
    """Advantages are clipped to plus and minus this."""
    shuffle: bool = False
    """Control experiment: deal the advantages to random samples. Nothing can be learned then."""


class LeaveOneOutAdvantages(Part):
    """Advantage = (reward - mean of the prompt's other samples in this epoch) / std of the batch.

    Remembers nothing: wants several samples a prompt in an epoch, as few prompts or many samples
    give. A prompt with one sample takes the mean of all other samples of the epoch.
    """

    type: Literal["leave_one_out"]
    clip: PositiveFloat = 5.0
    """Advantages are clipped to plus and minus this."""
    shuffle: bool = False
    """Control experiment: deal the advantages to random samples. Nothing can be learned then."""


class ValueAdvantages(Part):
    """Advantage = (reward - mean) / std over the whole epoch, less a learned V(prompt, timestep).

    V is a small network on the prompt's embedding, trained on each epoch's rewards after the
    policy's updates. It remembers prompts from epoch to epoch, and knows something of those that
    it has not seen: for sets of so many prompts that each is drawn too rarely for statistics.
    """

    type: Literal["value"]
    clip: PositiveFloat = 5.0
    """Normalised rewards, and advantages, are clipped to plus and minus this."""
    shuffle: bool = False
    """Control experiment: deal the rewards to random samples. Nothing can be learned then."""
    value_epochs: PositiveInt = 10
    """Steps of AdamW that V takes after each epoch's updates, each on all samples."""
    value_learning_rate: PositiveFloat = 1e-3
    """Of V; the policy has its own in `optimizer`."""


class DdpoIsConfig(Part):
    """DDPO-IS: several updates on one round of samples, corrected by clipped importance ratios."""

    type: Literal["ddpo_is"] = "ddpo_is"
    clip_range: PositiveFloat = 1e-4
    """The ratio is clipped to 1 ± this. So small since log-densities are means over dimensions."""
    updates_per_epoch: PositiveInt = 4
    """Optimizer steps an epoch; each sees samples_per_epoch / updates_per_epoch samples."""
    old_log_probs: Literal["auto", "stored", "recompute"] = "auto"
    """Where the ratio's denominator comes from. `auto` recomputes it in the update's own graph if
    low precision moves the ratio by more than a tenth of the clip range before any update."""
    kl_weight: NonNegativeFloat = Field(default=0.0, exclude_if=is_off)
    """Adds so many times the KL divergence from the base model to the loss: keeps the adapter near
    what the model drew before. 0 is none; above it an update costs one more forward a pair."""


class DdpoSfConfig(Part):
    """DDPO-SF: the score function estimator, exactly one update on a round of samples."""

    type: Literal["ddpo_sf"]
    updates_per_epoch: int = 1
    """Always 1: the estimator holds only for samples of the policy that is being updated."""
    kl_weight: NonNegativeFloat = Field(default=0.0, exclude_if=is_off)
    """Adds so many times the KL divergence from the base model to the loss: keeps the adapter near
    what the model drew before. 0 is none; above it an update costs one more forward a pair."""

    @field_validator("updates_per_epoch")
    @classmethod
    def _one_update(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                f"ddpo_sf takes exactly one update a sampling round, not {value}: after the first, "
                "the samples are no longer the policy's own and nothing corrects for it; "
                "set it to 1, or use `type: ddpo_is`"
            )
        return value


Advantages = Annotated[
    PerPromptAdvantages | BatchAdvantages | LeaveOneOutAdvantages | ValueAdvantages,
    Field(discriminator="type"),
]
Algorithm = Annotated[
    DdpoIsConfig | DdpoSfConfig | RwrConfig | RwrSparseConfig, Field(discriminator="type")
]
