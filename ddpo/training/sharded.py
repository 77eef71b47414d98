"""Full fine-tuning by several processes, of which each holds a part of weights and moments.

FSDP2 gathers the weights of a block when it computes, and hands its gradients to the processes that
hold its parts. They are added in the order of the micro-batches, as one process adds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from ddpo.models import Policy
from ddpo.models.sharded import sharded
from ddpo.training.ranks import Backward, Batch, Group, Parameters, taken


class Sharded(Group):
    """The default process group, whose ranks split the weights of a whole network."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._sums: list[_Sums] = []

    @contextmanager
    def sharing(self, policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Split the weights; see `Ranks.sharing`."""
        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, self._device.type)
        with sharded(policy, mesh, weights) as parts:
            self._sums = []
            for module in parts.split_modules():
                sums = _Sums()
                module.set_custom_reduce_scatter(sums)
                # A sum: the losses are already divided by the number of items of the update.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                self._sums.append(sums)
            yield
        self._sums = []

    def add_up(
        self, parameters: Parameters, batches: Sequence[Batch], backward: Backward[Batch]
    ) -> list[tuple[float, ...]]:
        """Run this rank's micro-batches, of which one is in each round; see `Ranks.add_up`.

        A rank without one in the last round runs the round's first, which counts once.
        """
        before, values = taken(parameters), []
        for start in range(0, len(batches), self.size):
            turn = batches[start : start + self.size]
            for sums in self._sums:
                sums.begin(len(turn), fresh=start == 0)
            taken(parameters)  # they are in the sums
            mine = backward(turn[self._rank if self._rank < len(turn) else 0])
            row = torch.tensor(mine, dtype=torch.float64, device=self._device)
            values += [tuple(row.tolist()) for row in self._gathered(row)[: len(turn)]]
        for name, total in taken(parameters).items():
            parameters[name].grad = before[name] + total if name in before else total
        return values

    def mine(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return every n-th, or the last round's first as `add_up` does; see `Ranks.mine`."""
        missing = -len(batches) % self.size
        first = batches[(len(batches) - 1) // self.size * self.size]
        return [*batches, *[first] * missing][self._rank :: self.size]


class _Sums(ReduceScatter):
    """Adds the gradients of some weights, round by round, each rank those of its part."""

    def begin(self, batches: int, *, fresh: bool) -> None:
        """Begin a round.

        Args:
            batches: Number of ranks whose gradients count, from the first.
            fresh: Whether sums begin at zero; they continue otherwise.
        """
        self._batches = batches
        if fresh:
            self._total: Tensor | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return memory for the gradients of one round."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Write the sums so far, of this rank's part, after this round."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        parts = received.chunk(group.size())[: self._batches]
        output_tensor.copy_(parts[0] if self._total is None else self._total)
        for part in parts if self._total is not None else parts[1:]:
            output_tensor += part
        self._total = output_tensor
