"""Coefficients-preserving sampling: as much noise as the flow has at every sigma (Flow-CPS)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpo.diffusion.base import Transition
from ddpo.diffusion.flow import FlowProcess


class FlowCps(FlowProcess):
    """Noise of the next sigma times sin(noise level pi / 2), taken from what the step predicts.

    The images of training are therefore as clean as those of inference, and the last step draws no
    noise. Log-probs leave the variance out, as published.
    """

    name = "flow_cps"

    def stds(self, steps: Tensor) -> Tensor:
        """Return the standard deviation of each step."""
        return self.sigmas[steps + 1] * math.sin(self.noise_level * math.pi / 2)

    def noisy_transition(self, steps: Tensor, velocity: Tensor, latents: Tensor) -> Transition:
        """Return the Gaussian of each pair's step."""
        sigma, after = self.around(steps, latents)
        std = self.stds(steps).reshape(sigma.shape)
        clean = latents - sigma * velocity
        noise = latents + velocity * (1 - sigma)
        mean = clean * (1 - after) + noise * torch.sqrt(after**2 - std**2)
        return Transition(mean, std, normalized=False)
