"""How rewards become weights of the denoising loss (arXiv 2305.13301, section 4.1).

As published: 10,240 final latents an epoch, in 10 epochs; RWR passes over them 5 times, RWR-sparse
50 times over the best 1,024, which is as many gradient steps.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from ddpo.basics.part import Part


class _RegressionConfig(Part):
    """What both algorithms share: how often the samples are passed over, in how many steps."""

    inner_epochs: PositiveInt
    """Passes over an epoch's samples; each with another order, other noise, other timesteps."""
    updates_per_epoch: PositiveInt
    """Optimizer steps an epoch, over all passes together: a multiple of inner_epochs. A pass with
    fewer samples than steps takes a step a sample."""

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps of one pass over the samples."""
        return self.updates_per_epoch // self.inner_epochs

    @model_validator(mode="after")
    def _passes_are_alike(self) -> _RegressionConfig:
        if self.updates_per_epoch % self.inner_epochs:
            more = (self.updates_per_pass + 1) * self.inner_epochs
            fewer = max(self.updates_per_pass, 1) * self.inner_epochs
            raise ValueError(
                f"updates_per_epoch {self.updates_per_epoch} is no multiple of inner_epochs "
                f"{self.inner_epochs}, and every pass takes as many steps; set it to "
                f"{' or '.join(map(str, sorted({fewer, more})))}"
            )
        return self


class RwrConfig(_RegressionConfig):
    """RWR: the denoising loss on the model's own final latents, weighted by N softmax(beta r)."""

    type: Literal["rwr"]
    beta: float = Field(default=0.2, ge=0.0, allow_inf_nan=False)
    """Inverse temperature of the softmax, for a unit of the reward. Higher: fewer samples count; 0:
    all alike, a control that learns nothing of the reward."""
    weights_over: Literal["data_set", "prompt"] = "data_set"
    """What shares a softmax: all samples of the epoch, or those of a prompt (as published for the
    aesthetic task), so that an easy prompt outweighs no other."""
    inner_epochs: PositiveInt = 5
    """Passes over an epoch's samples; each with another order, other noise, other timesteps."""
    updates_per_epoch: PositiveInt = 20
    """Optimizer steps an epoch, over all passes together: each sees
    samples_per_epoch * inner_epochs / updates_per_epoch samples."""


class RwrSparseConfig(_RegressionConfig):
    """RWR-sparse: the denoising loss on the best final latents of each prompt, unweighted."""

    type: Literal["rwr_sparse"]
    keep: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of each prompt's samples, rounded down, but at least one."""
    inner_epochs: PositiveInt = 50
    """Passes over the samples that are kept; each with another order, other noise, other
    timesteps."""
    updates_per_epoch: PositiveInt = 50
    """Optimizer steps an epoch, over all passes together: a multiple of inner_epochs. A pass over
    fewer samples than steps takes a step a sample."""


Regression = RwrConfig | RwrSparseConfig
