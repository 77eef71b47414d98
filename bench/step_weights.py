"""Which denoising steps make up the policy gradient: ``python -m bench.step_weights``.

The score of a step is its noise times (d mean / d prediction) / std. That factor depends on the
schedule alone; its square is the step's share of the gradient's variance, as far as predictions of
all steps move alike with the weights.
"""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch
from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from ddpo.diffusion.ddim import NoiseSchedule, ddim_transition
from ddpo.starter import STARTER_PATH

_PUBLISHED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Scheduler of Stable Diffusion 1.x, as its `scheduler_config.json` has it."""


def score_weights(schedule: NoiseSchedule) -> Tensor:
    """Return |d mean / d prediction| / std of each step.

    Args:
        schedule: The steps; each draws noise.

    Returns:
        [T] float64.
    """
    timesteps = schedule.timesteps
    prediction = torch.zeros(len(timesteps), 1, 1, 1, dtype=torch.float64, requires_grad=True)
    step = ddim_transition(schedule, prediction, torch.zeros_like(prediction), timesteps)
    (slope,) = torch.autograd.grad(step.mean.sum(), prediction)
    return (slope.abs() / step.std).flatten()


def main() -> None:
    """Print a row a step: timestep, noise, weight, share of all squared weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", choices=("starter", "stable-diffusion"), default="starter")
    arguments = parser.parse_args()
    config: Any = _PUBLISHED
    if arguments.model == "starter":
        config = DDIMScheduler.load_config(str(STARTER_PATH / "scheduler"))
    scheduler = cast(DDIMScheduler, DDIMScheduler.from_config(config))
    schedule = NoiseSchedule.from_scheduler(scheduler, steps=arguments.steps, eta=1.0)
    weights = score_weights(schedule)
    shares = weights**2 / (weights**2).sum()
    print("step  timestep  noise  weight  share")
    stds = schedule.stds(schedule.timesteps).flatten()
    for step, timestep in enumerate(schedule.timesteps):
        print(
            f"{step:4d}  {int(timestep):8d}  {stds[step]:5.3f}  {weights[step]:6.2f}  "
            f"{shares[step]:5.1%}"
        )


if __name__ == "__main__":
    main()
