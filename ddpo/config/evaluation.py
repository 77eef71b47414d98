"""Settings of evaluations."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from ddpo.basics.limits import Seed
from ddpo.basics.part import Part, is_off
from ddpo.config.gate import GateConfig
from ddpo.config.model import Resolution
from ddpo.config.plugins import NamedConfig, RewardConfig
from ddpo.config.sampler import SamplerConfig


class EvaluationConfig(Part):
    """Fixed prompts and seeds, sampled at inference settings, scored by several rewards."""

    every: PositiveInt = 5
    """Evaluate the first checkpoint, every n-th one after it, and the last one."""
    prompts: NamedConfig | None = Field(default=None, exclude_if=is_off)
    """A prompt set; by default the run's own."""
    count: PositiveInt = 16
    """Number of its prompts to use, spread over the whole set."""
    seeds: tuple[Seed, ...] = Field(default=(0, 1), min_length=1)
    """Each prompt is sampled with each seed. Diversity needs at least two."""
    steps: PositiveInt | None = Field(default=None, exclude_if=is_off)
    """Denoising steps; by default those of the run's sampler."""
    guidance_scale: float | None = Field(default=None, ge=1.0, exclude_if=is_off)
    """Classifier-free guidance; by default that of the run's sampler."""
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of DDPM's noise; 0, which users sample with, is deterministic. Flows have none."""
    resolution: Resolution = Field(default=None, exclude_if=is_off)
    """Image size in pixels: one number for a square, or `[width, height]`. That of the run's
    samples by default."""
    rewards: tuple[RewardConfig, ...] = ()
    """Rewards that the run does not train on: held-out judges of the same images."""
    kl_samples: NonNegativeInt = 4
    """Samples, by the run's own sampler, over which the KL divergence from the base model is
    measured; 0 leaves it out."""
    gate: GateConfig = GateConfig()
    """Which checkpoints are taken to exploit the reward, and what follows."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a seed appears twice, which would give the same image twice")
        return value

    def sampler_of(self, own: SamplerConfig) -> SamplerConfig:
        """Return a run's sampler at these settings, which are those of inference."""
        changes: dict[str, Any] = {}
        for name in ("steps", "guidance_scale"):
            if (value := getattr(self, name)) is not None:
                changes[name] = value
        return own.at_inference(self.eta).changed(**changes)
