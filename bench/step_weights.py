"""Which denoising steps make up the policy gradient: ``python -m bench.step_weights``.

The score of a step is its noise times (d mean / d prediction) / std. That factor depends on the
schedule alone; its square is the step's share of the gradient's variance, as far as predictions of
all steps move alike with the weights.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from ddpo.config import DdimSampler
from ddpo.diffusion.ddim import Ddim
from ddpo.models.schedule import NoiseSchedule
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


def score_weights(process: Ddim) -> Tensor:
    """Return |d mean / d prediction| / std of each step.

    Args:
        process: Each of its steps draws noise.

    Returns:
        [T].
    """
    scales = process.scales(range(process.steps))
    return scales.slopes / scales.stds


def main() -> None:
    """Print a row a step: timestep, noise, weight, share of all squared weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", choices=("starter", "stable-diffusion"), default="starter")
    arguments = parser.parse_args()
    config: Any = _PUBLISHED
    if arguments.model == "starter":
        config = json.loads((STARTER_PATH / "scheduler" / "scheduler_config.json").read_text())
    schedule = NoiseSchedule.from_scheduler(config)
    process = Ddim(schedule, DdimSampler(steps=arguments.steps), torch.device("cpu"))
    weights = score_weights(process)
    shares = weights**2 / (weights**2).sum()
    print("step  timestep  noise  weight  share")
    stds = process.stds(torch.arange(process.steps))
    for step, time in enumerate(process.times):
        print(
            f"{step:4d}  {int(time):8d}  {stds[step]:5.3f}  {weights[step]:6.2f}  "
            f"{shares[step]:5.1%}"
        )


if __name__ == "__main__":
    main()
