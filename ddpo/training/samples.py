"""The samples of one epoch, as training reads them, in the order of ``sample_id``.

Shapes: S samples, T denoising steps, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FinalLatents:
    """The clean latents alone: what the images were decoded from."""

    prompts: Sequence[str]
    """S prompts."""
    latents: Tensor
    """[S, C, h, w] float32."""


@dataclass(frozen=True)
class Rollouts:
    """Whole trajectories."""

    prompts: Sequence[str]
    """S prompts."""
    latents: Tensor
    """[S, T+1, C, h, w] float32, from noise to clean; fewer than S where there are `places`."""
    log_probs: Tensor
    """[S, T] float32, of the policy that sampled."""
    places: Tensor | None = None
    """[S] int64, where in `latents` each sample's are, -1 for those that this rank does not have;
    None if it has all, in order."""

    def latents_at(self, samples: Tensor, steps: Tensor) -> Tensor:
        """Return some of the latents.

        Args:
            samples: [N] int64, rows.
            steps: [N] int64, from 0 (noise) to T (clean).

        Returns:
            [N, C, h, w].

        Raises:
            IndexError: This rank does not have one of them.
        """
        if self.places is None:
            return self.latents[samples, steps]
        places = self.places[samples]
        if (places < 0).any():
            row = int(samples[places < 0][0])
            raise IndexError(f"the latents of sample {row} were not read on this rank")
        return self.latents[places, steps]

    @property
    def final(self) -> FinalLatents:
        """The clean latents alone."""
        assert self.places is None  # what trains on final latents reads all of them
        return FinalLatents(self.prompts, self.latents[:, -1])


Samples = Rollouts | FinalLatents


def samples_of(
    prompts: Sequence[str], tensors: Mapping[str, Tensor], places: Tensor | None = None
) -> Samples:
    """Return an epoch's samples from what its trajectory shards hold.

    Args:
        prompts: S prompts.
        tensors: ``latents`` [S, T+1, C, h, w] and ``log_probs`` [S, T], or ``latents``
            [S, 1, C, h, w] alone.
        places: As `Rollouts.places`.
    """
    if "log_probs" not in tensors:
        return FinalLatents(prompts, tensors["latents"][:, -1])
    return Rollouts(prompts, tensors["latents"], tensors["log_probs"], places)
