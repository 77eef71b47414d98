"""DanceGRPO's SDE: equal noise per unit of time (arXiv 2505.07818)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpo.diffusion.base import Transition
from ddpo.diffusion.flow import FlowProcess


class DanceSde(FlowProcess):
    """Noise of the noise level, per unit of time."""

    name = "dance_sde"

    def stds(self, steps: Tensor) -> Tensor:
        """Return the standard deviation of each step."""
        return self.noise_level * torch.sqrt(self.sigmas[steps] - self.sigmas[steps + 1])

    def noisy_transition(self, steps: Tensor, velocity: Tensor, latents: Tensor) -> Transition:
        """Return the Gaussian of each pair's step."""
        sigma, after = self.around(steps, latents)
        dt = after - sigma
        clean = latents - sigma * velocity
        score = -(latents - clean * (1 - sigma)) / sigma**2
        mean = latents + (velocity - 0.5 * self.noise_level**2 * score) * dt
        std = self.stds(steps).reshape(sigma.shape)
        return Transition(mean, std)
