"""What training carries from epoch to epoch: the fold's accumulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ddpo.algorithms.base import PromptStatistics


@dataclass(frozen=True)
class TrainState:
    """All that training carries from epoch to epoch.

    Attributes:
        weights: The trained weights by name.
        optimizer: AdamW's state as ``moment/parameter``; empty before the first step.
        statistics: The last rewards of each prompt.
        epoch: The next epoch to run.
        updates: Optimizer steps so far.
        samples: Pictures drawn so far.
        ema: Moving average of the weights; empty where none is kept.
        value: The value function's weights and its AdamW's state; empty where there is none, and
            before it is first trained.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    statistics: PromptStatistics
    epoch: int
    updates: int
    samples: int
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    value: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shown_weights(self) -> Mapping[str, Tensor]:
        """What pictures are drawn with and what is exported: the average, if one is kept."""
        return self.ema or self.weights
