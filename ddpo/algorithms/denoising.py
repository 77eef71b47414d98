"""What algorithms share that train on final latents alone: noise them, predict, compare.

No trajectory, no log-prob of a step, no guidance. An algorithm says at which times samples are
noised, which other weight sets predict the same, and what it makes of the predictions.

Shapes: S samples of an epoch, N noised samples of one forward, latents of any shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt, model_validator

from ddpo.algorithms.base import Algorithm, Needs, RunSettings, Update
from ddpo.basics.part import check_divides
from ddpo.basics.randomness import derive_seed, generator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DenoisingBatch:
    """The noised samples of one forward."""

    prediction: Tensor
    """[N, ...], of the latents' shape, with a gradient."""
    target: Tensor
    """[N, ...], what the model should have predicted."""
    credit: Mapping[str, Tensor]
    """[N] each, by the names of the credit table's columns."""
    clean: Tensor
    """[N, ...], the final latents x_0."""
    times: Tensor
    """[N] in [0, 1], the times as shares of the model's time axis; sigma on a rectified flow."""
    clean_from: Callable[[Tensor], Tensor]
    """Turns a prediction, [N, ...], into the clean latents that it implies."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """[N, ...] each, without a gradient: what the weight sets predict that the algorithm needs."""


@dataclass(frozen=True)
class Times:
    """The times at which a sample is noised in one pass."""

    source: Literal["training", "sampler"] = "training"
    """`training`: one time from the distribution that the model was trained with. `sampler`: times
    of the sampler's own steps, in random order."""
    share: float = 1.0
    """The first share of the sampler's steps counts, rounded down, but at least one step."""
    count: int | None = None
    """How many of those steps: one at random from each of so many equal parts, or all if there are
    fewer. By default all."""


class DenoisingAlgorithm(Algorithm):
    """An algorithm that trains on final latents, in passes over an epoch's samples."""

    inner_epochs: PositiveInt
    """Passes over an epoch's samples, each with its own order, noise and timesteps."""
    updates_per_epoch: PositiveInt
    """Optimizer steps per epoch, over all passes together: a multiple of inner_epochs. A pass with
    fewer samples than steps takes one step per sample."""

    @model_validator(mode="after")
    def _passes_are_alike(self) -> DenoisingAlgorithm:
        if self.updates_per_epoch % self.inner_epochs:
            more = (self.updates_per_pass + 1) * self.inner_epochs
            fewer = max(self.updates_per_pass, 1) * self.inner_epochs
            raise ValueError(
                f"updates_per_epoch {self.updates_per_epoch} is not a multiple of inner_epochs "
                f"{self.inner_epochs}, and every pass takes the same number of steps; set it to "
                f"{' or '.join(map(str, sorted({fewer, more})))}"
            )
        return self

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps of one pass over the samples."""
        return self.updates_per_epoch // self.inner_epochs

    @property
    def needs(self) -> Needs:
        """Final latents only."""
        return Needs("final_latents")

    @property
    def times(self) -> Times:
        """When samples are noised."""
        return Times()

    def check_passes(self, run: RunSettings) -> None:
        """Check that the steps of a pass are of equal size.

        Raises:
            ValueError: They are not.
        """
        name = f"algorithm.updates_per_epoch / inner_epochs {self.inner_epochs} ="
        check_divides(name, self.updates_per_pass, "samples_per_epoch", run.samples_per_epoch)

    def trained(self, credit: Mapping[str, Tensor]) -> list[int]:
        """Return the samples that are passed over; all by default.

        Samples that one loss compares follow each other.
        """
        return list(range(len(credit["reward"])))

    def updates(
        self, credit: Mapping[str, Tensor], *, run_seed: int, epoch: int
    ) -> Sequence[Update]:
        """Return shuffled passes over the samples that are trained on."""
        samples, together = self.trained(credit), self.needs.samples_per_loss
        steps = self.updates_per_pass
        return [
            Update(step, inner)
            for inner in range(self.inner_epochs)
            for step in steps_of_pass(run_seed, epoch, inner, samples, steps, together)
        ]

    @abstractmethod
    def losses(self, batch: DenoisingBatch) -> Tensor:
        """Return the loss of each noised sample [N]; see `Algorithm.losses`."""

    @property
    def measured(self) -> tuple[str, ...]:
        """What is worth showing of forwards, by name; the means over an epoch are shown."""
        return ()

    def measures(self, batch: DenoisingBatch) -> Mapping[str, Tensor]:
        """Return what is :attr:`measured` of one forward, [N] each."""
        return {}


def steps_of_pass(
    run_seed: int,
    epoch: int,
    inner_epoch: int,
    samples: Sequence[int],
    updates: int,
    together: int = 1,
) -> list[list[int]]:
    """Shuffle the samples and cut them into the steps of one pass.

    Args:
        run_seed: The config's ``seed``.
        epoch: The epoch.
        inner_epoch: The pass; each has its own order.
        samples: The rows to pass over.
        updates: Steps of the pass; one per sample where there are fewer samples.
        together: How many consecutive rows stay together, in their order, and count as one sample.

    Returns:
        The rows of each step: every row once, in steps whose sizes differ by at most 1; no step
        where there is no sample.
    """
    import torch

    seed = derive_seed(run_seed, "regression order", epoch, inner_epoch)
    count = len(samples) // together
    order = torch.randperm(count, generator=generator(seed))
    steps = order.tensor_split(min(updates, count)) if count else []
    return [
        [row for i in step.tolist() for row in samples[i * together : (i + 1) * together]]
        for step in steps
    ]
