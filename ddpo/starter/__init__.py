"""The starter: a small text-to-image model that ships with the package, and how it was trained."""

from pathlib import Path

STARTER_PATH: Path = Path(__file__).parent / "weights"
"""Folder that `StableDiffusionPipeline.from_pretrained` loads with nothing else."""
