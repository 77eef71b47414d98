"""From noise to images: denoising processes, one file each, windows of steps, sampling.

`base.py` says what a process has to provide.
"""

from collections.abc import Mapping

from ddpo.diffusion.base import Process, Transition
from ddpo.diffusion.ddim import Ddim

PROCESSES: Mapping[str, type[Process]] = {"ddim": Ddim}
"""The registry: the process of a sampler's `type`, whose settings are in `ddpo.config.sampler`."""

__all__ = ["PROCESSES", "Process", "Transition"]
