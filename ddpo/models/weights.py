"""The weights that training changes, and the other sets that a network can compute with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import (
        FluxTransformer2DModel,  # pyright: ignore[reportPrivateImportUsage]
        SD3Transformer2DModel,  # pyright: ignore[reportPrivateImportUsage]
        UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
    )

    Network = UNet2DConditionModel | SD3Transformer2DModel | FluxTransformer2DModel
    """The denoising networks of all families."""

WeightSet = Literal["trained", "average", "base", "old", "start"]
"""A set of weights that a policy can compute with: the trained ones, their moving average for
images and exports, the base model's, the old ones that an algorithm keeps, or the trained ones
before the epoch that is being trained."""


class Weights(ABC):
    """The weights of a network that training changes, in float32 whatever the network computes in.

    Args:
        network: The denoising network.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._kept: dict[WeightSet, Mapping[str, Tensor]] = {}

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the weights that are in the network by name; views, not copies."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights in place, so that optimizers keep their hold on the parameters."""

    @abstractmethod
    @contextmanager
    def _use_base(self) -> Iterator[None]:
        """Let the network be the base model's inside the block.

        Raises:
            ConfigError: The base model's weights are gone.
        """
        yield

    @property
    def train_text(self) -> bool:
        """Whether what prompts are encoded to changes with the weights."""
        return False

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters by their name in the network, in a fixed order."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def keep(self, name: WeightSet, weights: Mapping[str, Tensor]) -> None:
        """Keep a set for :meth:`use`, replacing an earlier one of that name.

        Args:
            name: The set; not "trained", which is what the network holds.
            weights: By the names of :meth:`state`; kept by reference.
        """
        self._kept[name] = weights

    @contextmanager
    def use(self, name: WeightSet) -> Iterator[None]:
        """Let the network compute with a named set inside the block; the trained one returns after.

        Use it without gradients, and do not train inside the block.

        Args:
            name: "trained" changes nothing.

        Raises:
            ConfigError: The base model's weights are gone.
            KeyError: No such set is kept.
        """
        if name == "trained":
            yield
        elif name == "base" and name not in self._kept:
            with self._use_base():
                yield
        else:
            kept = self._kept[name]
            trained = {
                key: value.detach().to("cpu", copy=True) for key, value in self.state().items()
            }
            try:
                self.load(kept)
                yield
            finally:
                self.load(trained)
