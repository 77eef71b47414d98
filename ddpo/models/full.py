"""Full fine-tuning: every weight of the network is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ddpo.errors import ConfigError
from ddpo.models.weights import Weights

if TYPE_CHECKING:
    from ddpo.models.weights import Network


class FullWeights(Weights):
    """All weights of a network, in float32 whatever it computes in.

    Args:
        network: Frozen, float32; all of it becomes trainable.
        scratch_seed: Of random weights in place of the network's own; None keeps these.
    """

    def __init__(self, network: Network, *, scratch_seed: int | None = None) -> None:
        super().__init__(network)
        if scratch_seed is not None:
            # Layers draw from the global generator: seed it, and leave it as it was.
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(scratch_seed)
                fresh = cast("Network", type(network).from_config(network.config))
                network.load_state_dict(fresh.state_dict())
        network.requires_grad_(True)

    def state(self) -> dict[str, Tensor]:
        """Return the network's own state."""
        return self.network.state_dict()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load a network's weights in place."""
        self.network.load_state_dict(weights)

    @contextmanager
    def _use_base(self) -> Iterator[None]:
        """Refuse: full fine-tuning overwrites the base model."""
        raise ConfigError(
            "full fine-tuning leaves no base model to compare with, since it overwrites the base "
            "model's weights; use `trainable: {type: lora}`"
        )
        yield
