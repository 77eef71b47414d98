"""Flow-GRPO's SDE, which keeps a flow's marginals (arXiv 2505.05470)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpo.diffusion.base import Transition
from ddpo.diffusion.flow import FlowProcess


class FlowSde(FlowProcess):
    """Noise of sqrt(sigma / (1 - sigma)) times the noise level, per unit of time.

    At sigma 1 the next sigma stands in the denominator, and nowhere else, as published.
    """

    name = "flow_sde"

    def _spread(self, steps: Tensor) -> Tensor:
        """Return the noise per unit of time, [B]."""
        sigma = self.sigmas[steps]
        bounded = torch.where(sigma == 1, self.sigmas[1], sigma)
        return torch.sqrt(sigma / (1 - bounded)) * self.noise_level

    def stds(self, steps: Tensor) -> Tensor:
        """Return the standard deviation of each step."""
        return self._spread(steps) * torch.sqrt(self.sigmas[steps] - self.sigmas[steps + 1])

    def noisy_transition(self, steps: Tensor, velocity: Tensor, latents: Tensor) -> Transition:
        """Return the Gaussian of each pair's step.

        Its KL divergence is per unit of time, without the step's length, as published.
        """
        sigma, after = self.around(steps, latents)
        spread = self._spread(steps).reshape(sigma.shape)
        dt = after - sigma
        drift = spread**2 / (2 * sigma)
        mean = latents * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
        return Transition(mean, spread * torch.sqrt(-dt), divergence_scale=spread)
