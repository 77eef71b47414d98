"""Settings of the gate of a run: which limits a checkpoint may not pass, and what follows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from ddpo.basics.part import Part

ImageStatistic = Literal["brightness", "dark", "blown", "edges", "entropy", "jpeg_kb"]
"""What is measured of each image of an evaluation."""


class GateConfig(Part):
    """Limits on an evaluated checkpoint. Passing one is an alarm: the reward may be exploited."""

    then: Literal["warn", "stop", "roll_back"] = "warn"
    """What an alarm leads to: a warning; the end of training; or the end of training and the
    export of the champion in place of the last checkpoint."""
    judges: bool = True
    """No judge may fall while the run's own reward rises, each by more than chance."""
    statistics: tuple[ImageStatistic, ...] = (
        "brightness",
        "dark",
        "blown",
        "edges",
        "entropy",
        "jpeg_kb",
    )
    """Statistics of images that `most_shifted` limits."""
    most_shifted: PositiveFloat = 2.0
    """How far the mean of a statistic may move, in standard deviations over the first checkpoint's
    images."""
    least_diversity: float | None = Field(default=0.7, gt=0.0, le=1.0)
    """Diversity of the images of one prompt, as a share of the first checkpoint's; null for any."""
    most_kl: PositiveFloat | None = None
    """KL divergence of a denoising step from the base model's, mean over steps and latent
    dimensions. Any by default: it depends on the sampler, and grows with the guidance scale."""
    most_clipped: float | None = Field(default=0.5, gt=0.0, le=1.0)
    """Clip fraction of the epoch before the checkpoint; null for any."""
    most_constant: float | None = Field(default=0.8, gt=0.0, le=1.0)
    """Share of that epoch's prompts whose samples all have the same reward, and so no advantage;
    of the prompts that were sampled more than once. Null for any."""
