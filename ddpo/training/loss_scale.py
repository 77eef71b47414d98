"""The factor of losses before the backward pass in float16, whose range is narrow."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ddpo.models.numerics import Numerics

# As torch.amp.GradScaler moves it. That class keeps the scaled gradients until its optimizer's
# step, where an objective here hands over the gradient itself, and its state is not plain data.
_BACKOFF = 0.5
_GROWTH = 2.0
_GROWTH_INTERVAL = 2000


@dataclass(frozen=True)
class LossScale:
    """The scale of losses: halved after an overflow, doubled after 2000 steps without one.

    float16's smallest normal number is 6e-5. With the mean over thousands of items, gradients
    inside the network would be smaller: they are computed for the sum times this, and scaled down
    at the end.
    """

    value: float = 1024.0
    """What a summed loss is multiplied by; at least 1."""
    good_steps: int = 0
    """Optimizer steps since the scale last changed."""

    @property
    def least(self) -> bool:
        """Whether the scale is the least: what overflows now is the gradient itself."""
        return self.value <= 1.0

    def after_step(self) -> LossScale:
        """Return the scale after an optimizer step."""
        if self.good_steps + 1 < _GROWTH_INTERVAL:
            return replace(self, good_steps=self.good_steps + 1)
        return LossScale(self.value * _GROWTH)

    def after_overflow(self) -> LossScale:
        """Return the scale after a step that was skipped because its gradient overflowed."""
        return LossScale(max(self.value * _BACKOFF, 1.0))


def first_loss_scale(numerics: Numerics) -> LossScale | None:
    """Return the scale that training starts with; None where nothing is lost without one."""
    return LossScale() if numerics.dtype == "float16" else None
