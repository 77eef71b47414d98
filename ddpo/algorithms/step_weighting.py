"""How the steps of a trajectory are weighed against each other in the policy loss.

The score of a step with respect to the model's prediction is its noise, which is standard normal,
times slope / std. Shapes: K trained steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StepScales:
    """What the size of a step's score depends on, of K steps that draw noise, [K] each."""

    stds: Tensor
    """Standard deviation of the step's noise; above 0."""
    slopes: Tensor
    """|d mean / d prediction|: how far the step's mean moves with the model's prediction."""
    lengths: Tensor
    """How far the step goes in the model's own time: -dt of a flow; elsewhere, the slope."""


def equal_variance(scales: StepScales) -> Tensor:
    """Return the weights that give the scores of all steps the same variance.

    The standard deviation of a step's score is slope / std: the inverse of that is its weight.

    Args:
        scales: Of K steps.

    Returns:
        [K], of mean 1, so that the loss keeps its scale.
    """
    weights = scales.stds / scales.slopes
    return weights / weights.mean()
