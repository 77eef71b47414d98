"""Draw reference images with exported weights, by plain diffusers in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpo.basics.digests import canonical_json
from ddpo.diffusion import PlainScheduler
from ddpo.errors import ModelError
from ddpo.models import redraw

_LAST_LINES = 3
_MOST_DIFFERENT = {"float32": 1.0}
"""Mean difference of two images, of 255 levels, that is rounding: other batches add up in another
order. In 16 bits, in which the run has sampled but the proof does not, it may be larger."""
_MOST_DIFFERENT_IN_16_BITS = 8.0


@dataclass(frozen=True)
class Job:
    """What `redraw` reads: plain values only."""

    pipeline: str
    """Folder of the pipeline."""
    variant: str | None
    """Variant of its weights."""
    lora: str | None
    """Folder of the LoRA to add; None where the pipeline itself holds the trained weights."""
    device: str
    """Where to compute."""
    threads: int
    """Of torch."""
    prompts: Sequence[str]
    """A prompt per image."""
    seeds: Sequence[int]
    """The noise seed of each."""
    arguments: dict[str, Any]
    """Further arguments of the pipeline's call."""
    scheduler: PlainScheduler | None = None
    """What to sample with; by default the pipeline's own scheduler."""
    vae: str | None = None
    """Folder of another autoencoder than the pipeline's."""
    dtype: str = "float32"
    """Weights and arithmetic."""
    without: Sequence[str] = ("safety_checker", "feature_extractor")
    """Parts that are not loaded."""


def prove(job: Job, expected: Sequence[Image.Image], folder: Path, *, dtype: str) -> float:
    """Let a fresh process draw a job's images, and compare them with those that the run has.

    Args:
        job: The images.
        expected: As the run has sampled them.
        folder: For the job and the images; must exist.
        dtype: That of the run's arithmetic.

    Returns:
        The largest difference of an image, mean over pixels and channels, of 255 levels.

    Raises:
        ModelError: The process fails, or draws other images.
    """
    file = folder / "job.json"
    file.write_bytes(canonical_json(asdict(job)))
    # Without the program's folder on the path, whose modules have common names.
    done = subprocess.run(
        [sys.executable, "-P", redraw.__file__, str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        raise ModelError(f"plain diffusers in a fresh process cannot draw with them: {reason}")
    largest = max(
        _difference(Image.open(folder / f"{number}.png"), image)
        for number, image in enumerate(expected)
    )
    most = _MOST_DIFFERENT.get(dtype, _MOST_DIFFERENT_IN_16_BITS)
    if largest > most:
        raise ModelError(
            "plain diffusers in a fresh process draws other images with them: they differ by "
            f"{largest:.1f} of 255 levels in the mean; expected at most {most:g}"
        )
    return largest


def _difference(one: Image.Image, other: Image.Image) -> float:
    if one.size != other.size:
        return 255.0
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())
