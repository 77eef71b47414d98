"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddpo.basics.tensors import held_like
from ddpo.config import OptimizerConfig
from ddpo.models import Policy
from ddpo.training.state import TrainState


class Ema:
    """An average that follows the weights: ema = decay * ema + (1 - decay) * weights.

    Args:
        start: The average so far, or the weights if there is none yet; copied.
        decay: In [0, 1).
        weights: The weights; the average is held like them.
    """

    def __init__(
        self, start: Mapping[str, Tensor], decay: float, weights: Mapping[str, Tensor]
    ) -> None:
        self.decay = decay
        self.average = {
            name: held_like(value, weights[name]).to(torch.float32, copy=True)
            for name, value in start.items()
        }
        """Float32, by the weights' names."""

    @classmethod
    def of(cls, policy: Policy, state: TrainState, settings: OptimizerConfig) -> Ema | None:
        """Continue a state's average, or start one at its weights; None if none is kept."""
        if settings.ema_decay is None:
            return None
        return cls(state.shown_weights, settings.ema_decay, policy.weights.state())

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Take one step towards the weights.

        Args:
            weights: The trained weights by name.
        """
        for name, value in weights.items():
            self.average[name].mul_(self.decay).add_(value.float(), alpha=1 - self.decay)
