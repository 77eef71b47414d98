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
    """[S, T+1, C, h, w] float32, from noise to clean."""
    log_probs: Tensor
    """[S, T] float32, of the policy that sampled."""

    @property
    def final(self) -> FinalLatents:
        """The clean latents alone."""
        return FinalLatents(self.prompts, self.latents[:, -1])


Samples = Rollouts | FinalLatents


def samples_of(prompts: Sequence[str], tensors: Mapping[str, Tensor]) -> Samples:
    """Return an epoch's samples from what its trajectory shards hold.

    Args:
        prompts: S prompts.
        tensors: ``latents`` [S, T+1, C, h, w] and ``log_probs`` [S, T], or ``latents``
            [S, 1, C, h, w] alone.
    """
    if "log_probs" not in tensors:
        return FinalLatents(prompts, tensors["latents"][:, -1])
    return Rollouts(prompts, tensors["latents"], tensors["log_probs"])
