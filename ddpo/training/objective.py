"""What the training loop asks of an objective, and what the gradients of objectives share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpo.algorithms.base import Update
from ddpo.training.loss_scale import LossScale


class Objective(ABC):
    """The loss of one epoch: its gradient, update by update, and what was measured on the way."""

    items_per_sample: int
    """Items (forwards) that a sample of an update is made of, for progress."""

    @abstractmethod
    def accumulate(
        self, update: Update, scale: LossScale | None, on_items: Callable[[int], None]
    ) -> float:
        """Add the gradient of one update's loss to the policy's parameters.

        Args:
            update: What the update sees.
            scale: What the loss is scaled by before its backward; None without scaling.
            on_items: Called with the number of items just processed.

        Returns:
            The loss, the mean over the update's items.

        Raises:
            NonFiniteError: A loss is NaN or infinite.
        """

    @abstractmethod
    def finish(self) -> None:
        """Train what is trained after the policy's updates.

        Raises:
            NonFiniteError: It diverged.
        """

    @abstractmethod
    def forwards(self) -> int:
        """Return how many forwards of the network, one image each, the epoch's updates took."""

    @abstractmethod
    def metrics(self) -> dict[str, Any]:
        """Return what was measured, as JSON values by name, once the epoch is done."""

    def state(self) -> dict[str, Tensor]:
        """Return tensors, on the CPU, that the next epoch's objective needs."""
        return {}


def factor_of(scale: LossScale | None, count: int) -> float:
    """Return what the mean loss of ``count`` items is multiplied by before its backward."""
    return 1.0 if scale is None else scale.value * count


def unscale(parameters: Mapping[str, torch.nn.Parameter], factor: float) -> None:
    """Divide the accumulated gradients by the factor of their losses, in place."""
    if factor == 1.0:
        return
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad /= factor
