"""What training carries from epoch to epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ddpo.algorithms.base import PromptStatistics
from ddpo.training.loss_scale import LossScale

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainState:
    """Everything that training carries from epoch to epoch."""

    weights: Mapping[str, Tensor]
    """The trained weights by name."""
    optimizer: Mapping[str, Tensor]
    """AdamW's state as ``moment/parameter``; empty before the first step."""
    statistics: PromptStatistics
    """The most recent rewards of each prompt."""
    epoch: int
    """The next epoch to run."""
    updates: int
    """Optimizer steps so far."""
    samples: int
    """Images sampled so far."""
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    """Moving average of the weights; empty if none is kept."""
    value: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights and AdamW's state of the value function; empty if there is none, and before it is
    first trained."""
    old: Mapping[str, Tensor] = field(default_factory=dict)
    """What follows the weights once an epoch, for algorithms that keep old weights; else empty."""
    loss_scale: LossScale | None = None
    """The scale of losses in float16; None in other dtypes, and before the first update."""

    @property
    def shown_weights(self) -> Mapping[str, Tensor]:
        """The weights for images and export: the average, if one is kept."""
        return self.ema or self.weights

    @property
    def old_weights(self) -> Mapping[str, Tensor]:
        """The old weights; they start as the weights."""
        return self.old or self.weights
