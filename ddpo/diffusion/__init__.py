"""From noise to images: denoising processes, one file each, windows of steps, sampling.

`base.py` says what a process has to provide.
"""

from collections.abc import Mapping

from ddpo.diffusion.base import MarkovProcess, PlainScheduler, Process, Transition
from ddpo.diffusion.dance_sde import DanceSde
from ddpo.diffusion.ddim import Ddim
from ddpo.diffusion.dpm_solver import DpmSolver
from ddpo.diffusion.flow_cps import FlowCps
from ddpo.diffusion.flow_ode import FlowOde
from ddpo.diffusion.flow_sde import FlowSde
from ddpo.diffusion.unipc import UniPc

PROCESSES: Mapping[str, type[Process]] = {
    "ddim": Ddim,
    "flow_sde": FlowSde,
    "flow_cps": FlowCps,
    "dance_sde": DanceSde,
    "ode": FlowOde,
    "dpm_solver": DpmSolver,
    "unipc": UniPc,
}
"""The registry: the process of a sampler's `type`, whose settings are in `ddpo.config.sampler`."""

__all__ = ["PROCESSES", "MarkovProcess", "PlainScheduler", "Process", "Transition"]
