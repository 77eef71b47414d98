"""What training carries from epoch to epoch: the fold's accumulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

PromptStatistics = Mapping[str, tuple[float, ...]]
"""The last rewards of each prompt, oldest first."""


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
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    statistics: PromptStatistics
    epoch: int
    updates: int
    samples: int
