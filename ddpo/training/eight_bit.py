"""AdamW with moments in 8 bits, as bitsandbytes computes it (arXiv 2110.02861)."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpo.errors import ConfigError, MissingPackage

if TYPE_CHECKING:
    from bitsandbytes.optim import AdamW8bit

_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""The tables of what a moment's 256 values mean: the same for all weights, and never saved."""


def check_eight_bit(device: str) -> None:
    """Check that bitsandbytes is installed, and steps on a kind of device of this machine.

    Raises:
        MissingPackage: It is not installed.
        ConfigError: It has no kernels for the device, or cannot load them.
    """
    adamw = adamw_class()
    weight = torch.nn.Parameter(torch.zeros(4096, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        adamw([weight]).step()
    except Exception as error:  # of many kinds, none of them public
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"optimizer.eight_bit is true, but bitsandbytes cannot step on {device!r} here "
            f"({reason}). `python -m bitsandbytes` says more; or leave it out"
        ) from error


@cache
def adamw_class() -> type[AdamW8bit]:
    """Return AdamW with moments in 8 bits.

    Weights of fewer than 4,096 numbers have moments in float32. Between steps, an optimizer's state
    holds nothing but tensors: `step`, `state1` and `state2` (uint8, of the weight's shape), and
    `absmax1` and `absmax2` (float32, the scale of each 256 numbers).

    Raises:
        MissingPackage: bitsandbytes is not installed.
    """
    # On a CPU it warns that kernels for 4-bit products are missing, which nothing here computes.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise MissingPackage("bitsandbytes", "optimizer.eight_bit", "eight-bit") from None

    class EightBit(AdamW8bit):
        """Keeps the step as a tensor, as torch does, and tables to itself."""

        @torch.no_grad()
        def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            """Step one weight."""
            state = self.state[p]
            for name, kind in _MAPS.items():
                state[name] = self.name2qmap[kind] = self.name2qmap[kind].to(p.device)
            state["step"] = int(state["step"])
            super().update_step(group, p, gindex, pindex)
            state["step"] = torch.tensor(float(state["step"]))
            for name in _MAPS:
                del state[name]

    return EightBit
