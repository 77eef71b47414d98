"""Sizes of a run that the layout of a store, and threads and seeds of torch, can hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

EPOCH_LIMIT = 100_000
"""Epochs and shards have five digits, so that text order is numerical order."""
INDEX_LIMIT = 1_000_000
"""Sample indices have six digits, for the same reason."""
SEED_LIMIT = 2**63
"""Seeds of torch and of MLflow's tables."""
THREAD_LIMIT = 1024
"""More threads than cores only slow torch down, and systems refuse to start very many."""
LARGEST_RATE = 1e6
"""Of learning and of decay; products of two still fit into float32, as torch demands."""

Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
"""A seed of a random generator."""
