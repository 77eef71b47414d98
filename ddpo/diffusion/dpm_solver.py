"""DPM-Solver++ (arXiv 2211.01095), multistep, in terms of the predicted image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import JsonValue

from ddpo.diffusion.solver import Solver


class DpmSolver(Solver):
    """DPM-Solver++(2M) by default; diffusers lowers the order of the first and the last steps."""

    name = "dpm_solver"
    scheduler_name = "DPMSolverMultistepScheduler"
    own_settings: ClassVar[Mapping[str, JsonValue]] = {"algorithm_type": "dpmsolver++"}
