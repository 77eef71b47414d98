"""The means of an epoch's steps under the policy that sampled, kept until their update.

They take as much room as the trajectories, so they are in a temporary file.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ddpo.basics.mapped import mapped_tensor
from ddpo.training.pairs import Pairs


class OldMeans:
    """Means of next latents, one per (sample, timestep) pair of this rank.

    Args:
        pairs: The micro-batches whose means will be put in.
        shape: Of the epoch's pairs, [S, T].
    """

    def __init__(self, pairs: Iterable[Pairs], shape: torch.Size) -> None:
        self._places = torch.full(shape, -1)
        for each in pairs:  # a rank may compute some pairs twice
            self._places[each.samples, each.steps] = 0
        mine = self._places == 0
        self._places[mine] = torch.arange(int(mine.sum()))
        self._count = int(mine.sum())
        self._means: Tensor | None = None

    def put(self, pairs: Pairs, means: Tensor) -> None:
        """Keep the means of N pairs.

        Args:
            pairs: N pairs.
            means: [N, ...], of the latents' shape.
        """
        if self._means is None:
            shape = (self._count, *means.shape[1:])
            self._means = mapped_tensor(shape, means.dtype, "the means of an epoch's steps")
        self._means[self._at(pairs)] = means.to("cpu")

    def of(self, pairs: Pairs) -> Tensor:
        """Return the means of N pairs, [N, ...] on the CPU.

        Raises:
            IndexError: This rank has not computed one of them.
        """
        places = self._at(pairs)
        assert self._means is not None
        return self._means[places]

    def _at(self, pairs: Pairs) -> Tensor:
        places = self._places[pairs.samples, pairs.steps]
        if (places < 0).any():
            row = int(pairs.samples[places < 0][0])
            raise IndexError(f"the old means of sample {row} were not computed on this rank")
        return places
