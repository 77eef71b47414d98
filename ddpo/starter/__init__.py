"""The starters: small text-to-image models that ship with the package, and a judge of them."""

from __future__ import annotations

from pathlib import Path

STARTER_PATH: Path = Path(__file__).parent / "weights"
"""The model's folder, for `StableDiffusionPipeline.from_pretrained`."""

FLOW_STARTER_PATH: Path = Path(__file__).parent / "flow_weights"
"""The folder of the flow-matching one, for `StableDiffusion3Pipeline.from_pretrained`."""

JUDGE_PATH: Path = Path(__file__).parent / "judge_weights"
"""The judge's folder, for `ddpo.starter.judge.Judge.load` or transformers' `CLIPModel`."""
