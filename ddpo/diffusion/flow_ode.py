"""The flow itself, by Euler's steps: no noise, so no log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpo.diffusion.base import Transition
from ddpo.diffusion.flow import FlowProcess


class FlowOde(FlowProcess):
    """What diffusers' pipelines of flow-matching models do by default."""

    name = "ode"

    def stds(self, steps: Tensor) -> Tensor:
        """Return 0 for each step."""
        return torch.zeros(len(steps), device=self.sigmas.device)

    def noisy_transition(self, steps: Tensor, velocity: Tensor, latents: Tensor) -> Transition:
        """Return Euler's step, which draws none."""
        sigma, after = self.around(steps, latents)
        return Transition(latents + (after - sigma) * velocity, torch.zeros_like(sigma))
