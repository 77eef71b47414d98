"""Configs of a run for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpo.config import RunConfig
from ddpo.config.files import parse_config

MINIMAL = {
    "model": "starter",
    "prompts": {"name": "simple_animals"},
    "reward": {"name": "jpeg_compressibility"},
}


def parse(**changes: Any) -> RunConfig:
    return parse_config({**MINIMAL, **changes}, "run.yaml")


def written(folder: Path, content: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(content)
    return file
