"""DDPO with the score function estimator (arXiv 2305.13301, equation DDPO-SF; REINFORCE)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from ddpo.algorithms.base import RunSettings
from ddpo.algorithms.policy_gradient import PairBatch, PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor


class DdpoSf(PolicyGradient):
    """DDPO-SF: the score function estimator, exactly one update per round of samples."""

    type: Literal["ddpo_sf"]
    updates_per_epoch: int = 1
    """Always 1: the estimator holds only for samples of the policy being updated."""

    @field_validator("updates_per_epoch")
    @classmethod
    def _one_update(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                f"ddpo_sf takes exactly one update per sampling round, not {value}: after the "
                "first, the samples are no longer the policy's own and nothing corrects for it; "
                "set it to 1, or use `type: ddpo_is`"
            )
        return value

    def check_run(self, run: RunSettings) -> None:
        """Check as every policy gradient, and that samples are not made to be another policy's."""
        super().check_run(run)
        if run.samples_ahead:
            raise ValueError(
                "ddpo_sf with rollouts.sample_ahead: the estimator holds only for samples of the "
                "policy being updated, and nothing corrects for those of an older one; leave it "
                "out, or use `type: ddpo_is`"
            )

    def policy_losses(self, batch: PairBatch) -> Tensor:
        """Return -A log p, whose gradient is the policy gradient at the sampling policy only."""
        return -batch.advantages * batch.log_probs
