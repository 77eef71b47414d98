"""What the training loop asks of an objective, and what the gradients of objectives share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpo.algorithms.base import Update
from ddpo.models.numerics import Numerics

# float16's smallest normal number is 6e-5. The mean over thousands of items would put gradients
# inside the network below it: they are computed of the sum, times this, and scaled down at the end.
_FLOAT16_LOSS_SCALE = 1024.0


class Objective(ABC):
    """The loss of one epoch: its gradient, update by update, and what was measured on the way."""

    items_per_sample: int
    """Items (forwards) that a sample of an update is made of, for progress."""

    @abstractmethod
    def accumulate(self, update: Update, on_items: Callable[[int], None]) -> float:
        """Add the gradient of one update's loss to the policy's parameters.

        Args:
            update: What the update sees.
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
    def metrics(self) -> dict[str, Any]:
        """Return what was measured, as JSON values by name, once the epoch is done."""

    def state(self) -> dict[str, Tensor]:
        """Return tensors, on the CPU, that the next epoch's objective needs."""
        return {}


def float16_loss_scale(numerics: Numerics) -> float:
    """Return what a summed loss is multiplied by before its backward; 1 where nothing is lost."""
    return _FLOAT16_LOSS_SCALE if numerics.dtype == "float16" else 1.0


def unscale(parameters: Mapping[str, torch.nn.Parameter], scale: float) -> None:
    """Divide the accumulated gradients by the scale of their losses, in place."""
    if scale == 1.0:
        return
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad /= scale
