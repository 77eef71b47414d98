"""Randomness by name: a sample depends only on run seed, epoch, index and purpose."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(run_seed: int, *path: int | str) -> int:
    """Derive the seed for one purpose from the run's.

    Args:
        run_seed: The config's ``seed``.
        *path: What the randomness is for, e.g. ``"noise", epoch, index``.

    Returns:
        A seed in [0, 2**63). Of a seed for `generator`, the lower 32 bits matter.
    """
    name = "/".join(str(part) for part in (run_seed, *path))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator, whose numbers do not depend on the device that uses them.

    Args:
        seed: PyTorch's CPU generator uses its lower 32 bits: two of 10,000 seeds coincide in these
            with a chance of 1 %.
    """
    import torch  # here: configs, which torch would slow down, import this module

    return torch.Generator(device="cpu").manual_seed(seed)
