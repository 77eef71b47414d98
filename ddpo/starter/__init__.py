"""The starter: a small text-to-image model that ships with the package, and a judge of it."""

from __future__ import annotations

from pathlib import Path

STARTER_PATH: Path = Path(__file__).parent / "weights"
"""The model's folder, for `StableDiffusionPipeline.from_pretrained`."""

JUDGE_PATH: Path = Path(__file__).parent / "judge_weights"
"""The judge's folder, for `ddpo.starter.judge.Judge.load` or transformers' `CLIPModel`."""
