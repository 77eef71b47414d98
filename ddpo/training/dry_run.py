"""A config's epoch in small: one optimizer step on a few short samples, to see what it takes."""

from __future__ import annotations

from typing import Any

from ddpo.config import RunConfig


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """Return a config whose epoch is one optimizer step, on samples of few steps.

    Args:
        config: The run's.
        steps: Denoising steps, all of which are trained.
    """
    changes: dict[str, Any] = {"updates_per_epoch": 1, "inner_epochs": 1}
    if config.rollouts.samples_per_prompt > 1:  # what is run is smaller than a group
        changes["advantages"] = {"type": "batch"}
    algorithm = config.algorithm.changed(
        **{
            name: value
            for name, value in changes.items()
            if name in type(config.algorithm).model_fields
        }
    )
    sampler = config.sampler.changed(steps=steps, window=None)
    return config.changed(algorithm=algorithm, sampler=sampler, fork=None)
