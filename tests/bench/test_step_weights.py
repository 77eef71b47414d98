"""bench.step_weights: what docs say of the last step but one, and its formula in plain floats."""

from __future__ import annotations

import math

import pytest
from diffusers import DDIMScheduler

from bench.step_weights import score_weights
from ddpo.starter import STARTER_PATH
from tests.checks import ddim

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def by_hand(scheduler: DDIMScheduler, steps: int) -> list[float]:
    """|d mean / d noise prediction| / sigma of each step at eta 1 (DDIM, equations 12 and 16)."""
    scheduler.set_timesteps(steps)
    alphas = [float(alpha) for alpha in scheduler.alphas_cumprod.double()]
    weights = []
    for timestep in scheduler.timesteps.tolist():
        before = timestep - 1000 // steps
        now, then = alphas[timestep], alphas[before] if before >= 0 else alphas[0]
        variance = (1 - then) / (1 - now) * (1 - now / then)
        slope = math.sqrt(1 - then - variance) - math.sqrt(then * (1 - now) / now)
        weights.append(abs(slope) / math.sqrt(variance))
    return weights


@pytest.mark.parametrize(
    ("model", "steps", "percent"),
    [("stable-diffusion", 50, 49), ("starter", 20, 73), ("starter", 10, 86), ("starter", 5, 95)],
)
def test_most_of_the_squared_score_is_the_last_step_but_ones(model: str, steps: int, percent: int):
    config = STABLE_DIFFUSION
    if model == "starter":
        config = DDIMScheduler.load_config(str(STARTER_PATH / "scheduler"))
    scheduler = DDIMScheduler.from_config(config)
    found = score_weights(ddim(scheduler, steps=steps)).tolist()
    assert found == pytest.approx(by_hand(scheduler, steps), rel=1e-5)
    squares = [weight**2 for weight in found]
    assert round(100 * squares[-2] / sum(squares)) == percent
