"""What prompts are to a model.

Shapes: B prompts, L tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: named tensors with one row per prompt.

    Every family provides ``text``, [B, L, D], the text encoder's output per token; any other tensor
    is private to the family.
    """

    tensors: Mapping[str, Tensor]
    """[B, ...] each."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Return some of the rows; a single index gives one row."""
        if isinstance(index, int):
            index = [index]
        return Conditioning({name: value[index] for name, value in self.tensors.items()})

    def expand(self, count: int) -> Conditioning:
        """Repeat a single row ``count`` times, without copying it."""
        return Conditioning(
            {name: value.expand(count, *value.shape[1:]) for name, value in self.tensors.items()}
        )

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate rows; all parts have the same names."""
        names = parts[0].tensors
        return cls({name: torch.cat([part.tensors[name] for part in parts]) for name in names})
