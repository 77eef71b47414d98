"""The starter: a small text-to-image model and a judge of it, and how both were trained."""

from pathlib import Path

STARTER_PATH: Path = Path(__file__).parent / "weights"
"""Folder that `StableDiffusionPipeline.from_pretrained` loads with nothing else."""

JUDGE_PATH: Path = Path(__file__).parent / "judge_weights"
"""Folder of the judge: `ddpo.starter.judge.Judge.load`, or transformers' `CLIPModel`."""
