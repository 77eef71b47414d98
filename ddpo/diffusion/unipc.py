"""UniPC (arXiv 2302.04867): each prediction also corrects the step that led to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import JsonValue

from ddpo.diffusion.solver import Solver


class UniPc(Solver):
    """UniPC with B_2(h); with B_1(h), diffusers' last step to an image without noise is NaN."""

    name = "unipc"
    scheduler_name = "UniPCMultistepScheduler"
    own_settings: ClassVar[Mapping[str, JsonValue]] = {"solver_type": "bh2"}
