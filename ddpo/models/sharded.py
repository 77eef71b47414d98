"""A whole network whose weights are split over several processes, by PyTorch's FSDP2."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ddpo.basics.tensors import held_like, whole
from ddpo.models.base import Policy
from ddpo.models.full import FullWeights
from ddpo.models.weights import Weights

_LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
"""What is gathered by itself; the weights of all other layers, small ones, are gathered together.

Not whole blocks: FSDP passes the inputs of what it gathers through nodes of their own in the graph
of the backward, and an input that is used there more than once, such as the timestep's embedding,
would have the gradients of its uses added in another order than without FSDP."""


class ShardedWeights(FullWeights):
    """All weights of a network, of which each process holds a part.

    While the network computes, it holds about one layer whole at a time. All processes have to
    compute with it equally often.

    Args:
        weights: All weights of another network, which keeps them.
        mesh: The processes.
    """

    def __init__(self, weights: Weights, mesh: DeviceMesh) -> None:
        # The copy shares its weights with the other network until they are split, which copies.
        shared = {
            id(p): torch.nn.Parameter(p.detach(), p.requires_grad)
            for p in weights.network.parameters()
        }
        super().__init__(copy.deepcopy(weights.network, shared))
        self._kept = weights._kept
        # Of operations in place on a layer's output: diffusers' networks have none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        layers = [m for m in self.network.modules() if isinstance(m, _LAYERS)]
        for module in (*layers, self.network):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load whole weights, or parts as :meth:`state` returns them."""
        own = self.state()
        super().load({name: held_like(value, own[name]) for name, value in weights.items()})

    def split_modules(self) -> list[FSDPModule]:
        """Return the modules whose weights are gathered and released together."""
        return [module for module in self.network.modules() if isinstance(module, FSDPModule)]


@contextmanager
def sharded(
    policy: Policy, mesh: DeviceMesh, before: Mapping[str, Tensor]
) -> Iterator[ShardedWeights]:
    """Let a policy train weights that are split over processes inside the block.

    Its own network is empty meanwhile. After the block it has the trained weights, and those of
    ``before`` if the block has failed.

    Args:
        policy: Of full fine-tuning.
        mesh: The processes; all of them enter and leave.
        before: What the policy holds, by name.

    Yields:
        The policy's weights.
    """
    own = policy.weights
    network, device = own.network, policy.device
    policy.weights = parts = ShardedWeights(own, mesh)
    for parameter in network.parameters():
        parameter.data = parameter.data.new_empty(0)
    after = before
    try:
        yield parts
        after = {name: whole(value) for name, value in parts.state().items()}
    finally:
        policy.weights = own
        for name, parameter in network.named_parameters():
            parameter.data = after[name].detach().to(device, copy=after is before)
