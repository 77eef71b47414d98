"""Algorithms, one file each: config, credit and loss. `base.py` says what one has to provide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from ddpo.algorithms.awm import Awm
from ddpo.algorithms.base import Algorithm
from ddpo.algorithms.ddpo_is import DdpoIs
from ddpo.algorithms.ddpo_sf import DdpoSf
from ddpo.algorithms.dpo import Dpo
from ddpo.algorithms.nft import Nft
from ddpo.algorithms.rwr import Rwr, RwrSparse

ALGORITHMS = (DdpoIs, DdpoSf, Rwr, RwrSparse, Nft, Awm, Dpo)
"""The registry: a new algorithm is a file and an entry here."""

if TYPE_CHECKING:
    AnyAlgorithm = Algorithm
else:
    AnyAlgorithm = Annotated[Union[ALGORITHMS], Field(discriminator="type")]  # noqa: UP007

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AnyAlgorithm",
    "Awm",
    "DdpoIs",
    "DdpoSf",
    "Dpo",
    "Nft",
    "Rwr",
    "RwrSparse",
]
