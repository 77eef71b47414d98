"""The section of a fork: the run and the epoch that it starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, model_validator

from ddpo.basics.part import Part


class ForkConfig(Part):
    """How a fork starts from its parent, a run of the same store; `ddpo fork` writes it.

    Epochs keep their numbers: a fork at epoch 3 has no epochs before 3.
    """

    run_id: str
    """The parent's name."""
    epoch: NonNegativeInt
    """The fork's first epoch. It starts from the parent's checkpoint before this epoch, and trains
    on the parent's rollouts of this epoch."""
    rollouts: NonNegativeInt = 1
    """Number of epochs whose rollouts are inherited before the fork samples its own. From the
    second on they come from another policy, so more than 1 needs `off_policy`. 0 inherits the
    checkpoint alone: sampler, dtype and the number of samples may then differ from the parent's."""
    statistics: Literal["rebuild", "reset"] = "rebuild"
    """Prompt statistics to start with. `rebuild` scores the epochs before the fork with its own
    reward; `reset` starts without any."""
    off_policy: bool = False
    """Allow inherited rollouts of another policy or base model; the sampler must be the same.
    Metrics then include the distribution of the importance ratio."""

    @model_validator(mode="after")
    def _more_is_off_policy(self) -> ForkConfig:
        if self.rollouts > 1 and not self.off_policy:
            raise ValueError(
                f"rollouts is {self.rollouts}, and from the second epoch on they come from another "
                "policy: set it to 1, or allow that with off_policy: true"
            )
        return self

    def inherits(self, epoch: int) -> bool:
        """Return whether an epoch trains on rollouts of the parent."""
        return self.epoch <= epoch < self.epoch + self.rollouts
