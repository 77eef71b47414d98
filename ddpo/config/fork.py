"""Where a run branches off another run of the same store."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from ddpo.basics.part import Part


class ForkConfig(Part):
    """The start of a run that goes on from another's checkpoint; `ddpo fork` writes it.

    Epochs keep their numbers: a fork at epoch 3 has no epochs before 3.
    """

    run_id: str
    """The run that it branches off."""
    epoch: NonNegativeInt
    """It starts from that run's checkpoint before this epoch, on this epoch's saved rollouts."""
    rollouts: PositiveInt = 1
    """Epochs of saved rollouts that are trained on before new ones are drawn. The policy that drew
    the second has not seen the first's update: more than 1 needs `off_policy`."""
    statistics: Literal["rebuild", "reset"] = "rebuild"
    """Prompt statistics to start with. `rebuild` scores the epochs before with this run's reward;
    `reset` starts with none."""
    off_policy: bool = False
    """Train on rollouts of another policy or base model instead of refusing them. The sampler must
    be the same. Metrics then have the importance ratio's distribution."""

    @model_validator(mode="after")
    def _more_is_off_policy(self) -> ForkConfig:
        if self.rollouts > 1 and not self.off_policy:
            raise ValueError(
                f"rollouts {self.rollouts}: after the first epoch's update they are of another "
                "policy; take 1, or say so with off_policy: true"
            )
        return self

    def adopts(self, epoch: int) -> bool:
        """Return whether an epoch is trained on saved rollouts."""
        return self.epoch <= epoch < self.epoch + self.rollouts
