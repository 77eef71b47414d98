"""Noised samples without a model: predictions are given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddpo.algorithms.denoising import DenoisingBatch
from ddpo.config import DdimSampler, OdeSampler
from ddpo.diffusion import Process
from ddpo.diffusion.ddim import Ddim
from ddpo.diffusion.flow_ode import FlowOde
from ddpo.models.flow_schedule import FlowSchedule
from ddpo.models.schedule import NoiseSchedule
from tests.tiny import SCHEDULE

KINDS = ("epsilon", "v_prediction", "velocity")


def process_of_kind(kind: str) -> Process:
    """Return a process whose model predicts this, in four steps without noise."""
    cpu = torch.device("cpu")
    if kind == "velocity":
        schedule = FlowSchedule.from_scheduler({"shift": 3.0}, 2, (16, 8, 8))
        return FlowOde(schedule, OdeSampler(steps=4), cpu)
    return Ddim(
        NoiseSchedule.from_scheduler({**SCHEDULE, "prediction_type": kind}),
        DdimSampler(steps=4, eta=0),
        cpu,
    )


def noised_batch(
    process: Process,
    clean: Tensor,
    noise: Tensor,
    times: Tensor,
    prediction: Tensor,
    advantages: Tensor,
    others: Mapping[str, Tensor],
) -> DenoisingBatch:
    """Return N noised samples as training makes them, with a prediction of one's own."""
    noisy, target = process.schedule.noised(clean, noise, times)
    return DenoisingBatch(
        prediction,
        target,
        {"advantage": advantages},
        clean,
        times / process.schedule.time_scale,
        lambda other: process.schedule.predicted_clean(noisy, other, times),
        others,
    )


def coefficients(kind: str, time: float) -> tuple[float, float]:
    """Return a and b of x_0 = a x_t + b prediction, from the schedules' definitions in float64."""
    if kind == "velocity":
        return 1.0, -time / 1000
    low, high = (float(SCHEDULE[name]) ** 0.5 for name in ("beta_start", "beta_end"))
    betas = torch.linspace(low, high, 1000, dtype=torch.float64) ** 2
    alpha = float((1 - betas[: int(time) + 1]).prod())
    if kind == "epsilon":
        return alpha**-0.5, -((1 / alpha - 1) ** 0.5)
    return alpha**0.5, -((1 - alpha) ** 0.5)
