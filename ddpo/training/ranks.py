"""One update by several processes: each runs some micro-batches, and all add up all gradients.

Gradients are added in the order of the micro-batches, not of their arrival, as one process adds
them. So any number of ranks takes the same steps, to the bit where the devices round alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddpo.basics.digests import tensors_digest
from ddpo.errors import DdpoError
from ddpo.models import Policy

Batch = TypeVar("Batch")
Parameters = Mapping[str, torch.nn.Parameter]
Backward = Callable[[Batch], tuple[float, ...]]
"""Adds a micro-batch's gradient to the parameters'; returns numbers to be added up."""


class RanksDiffer(DdpoError):
    """The ranks of one update do not hold the same weights after it."""


class Ranks(ABC):
    """The processes of one update, as seen by one of them."""

    size: int
    """How many there are."""

    @abstractmethod
    @contextmanager
    def sharing(self, policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Let all ranks train one policy inside the block.

        Args:
            policy: This process's.
            weights: What it holds, by name, the same on all ranks; it has them again if the block
                fails.
        """
        yield

    @abstractmethod
    def add_up(
        self, parameters: Parameters, batches: Sequence[Batch], backward: Backward[Batch]
    ) -> list[tuple[float, ...]]:
        """Add the gradients of all micro-batches to the parameters', in their order.

        Args:
            parameters: The same ones on all ranks, with equal gradients or none.
            batches: All micro-batches of the update, the same on all ranks.
            backward: Runs one of them on this rank.

        Returns:
            What ``backward`` has returned for each micro-batch, on all ranks.
        """

    @abstractmethod
    def mine(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return the batches that this rank computes, for :meth:`merged`.

        Where all ranks have to compute equally often, some are computed twice.
        """

    @abstractmethod
    def merged(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose entries are NaN except on the ranks that computed them.

        All ranks return the same one, with the entries of the first rank that has them.
        """

    @abstractmethod
    def check_equal(self, weights: Mapping[str, Tensor]) -> None:
        """Check that all ranks hold the same weights.

        Raises:
            RanksDiffer: They do not.
        """


class Alone(Ranks):
    """A process that runs its updates by itself."""

    size = 1

    @contextmanager
    def sharing(self, policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Leave the policy as it is; see `Ranks.sharing`."""
        yield

    def add_up(
        self, parameters: Parameters, batches: Sequence[Batch], backward: Backward[Batch]
    ) -> list[tuple[float, ...]]:
        """Run all micro-batches; see `Ranks.add_up`."""
        return [backward(batch) for batch in batches]

    def mine(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return all; see `Ranks.mine`."""
        return batches

    def merged(self, tensor: Tensor) -> Tensor:
        """Return the tensor; see `Ranks.merged`."""
        return tensor

    def check_equal(self, weights: Mapping[str, Tensor]) -> None:
        """Check nothing."""


class Group(Ranks):
    """The default process group of `torch.distributed`, as seen by this process.

    Args:
        device: Where collectives take their tensors: the CPU for gloo, the GPU for NCCL.
    """

    def __init__(self, device: torch.device) -> None:
        self.size = dist.get_world_size()
        self._rank = dist.get_rank()
        self._device = device

    @contextmanager
    def sharing(self, policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Leave the policy as it is: every rank holds all weights; see `Ranks.sharing`."""
        yield

    def add_up(
        self, parameters: Parameters, batches: Sequence[Batch], backward: Backward[Batch]
    ) -> list[tuple[float, ...]]:
        """Run this rank's micro-batches, of which one is in each round; see `Ranks.add_up`."""
        sums, values = taken(parameters), []
        names, width = list(parameters), 0
        for start in range(0, len(batches), self.size):
            turn = batches[start : start + self.size]
            mine = backward(turn[self._rank]) if self._rank < len(turn) else ()
            gradients = taken(parameters)
            if start == 0:  # rank 0 always has one
                names, width = self._told((list(gradients), len(mine)))
            row = torch.tensor(mine or [0.0] * width, dtype=torch.float64, device=self._device)
            values += [tuple(row.tolist()) for row in self._gathered(row)[: len(turn)]]
            shapes = [parameters[name] for name in names]
            flat = torch.cat(
                [(gradients.get(name, torch.zeros_like(p))).flatten() for name, p in
                 zip(names, shapes, strict=True)]
            )  # fmt: skip
            for each in self._gathered(flat)[: len(turn)]:
                parts = each.split([p.numel() for p in shapes])
                for name, part, p in zip(names, parts, shapes, strict=True):
                    sums[name] = sums[name] + part.view_as(p) if name in sums else part.view_as(p)
        for name, total in sums.items():
            parameters[name].grad = total
        return values

    def mine(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return every n-th; see `Ranks.mine`."""
        return batches[self._rank :: self.size]

    def merged(self, tensor: Tensor) -> Tensor:
        """Combine what all ranks computed; see `Ranks.merged`."""
        whole = torch.full_like(tensor, torch.nan)
        for each in self._gathered(tensor.to(self._device)):
            whole = torch.where(torch.isnan(whole), each.to(tensor), whole)
        return whole

    def check_equal(self, weights: Mapping[str, Tensor]) -> None:
        """Compare the digests of all ranks' weights; see `Ranks.check_equal`."""
        digests: list[str] = [""] * self.size
        dist.all_gather_object(digests, tensors_digest(dict(weights)))
        if len(set(digests)) > 1:
            raise RanksDiffer(
                f"the {self.size} ranks of an update hold different weights after it: "
                f"{', '.join(digest[:12] for digest in digests)}. Nothing was committed; use "
                "devices of one kind, with the same versions of torch"
            )

    def _told(self, value: tuple[list[str], int]) -> tuple[list[str], int]:
        """Return rank 0's value."""
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return all ranks' tensors, in the order of the ranks."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor.contiguous())
        return found


def taken(parameters: Parameters) -> dict[str, Tensor]:
    """Take the parameters' gradients from them, and return them by name."""
    found = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found
