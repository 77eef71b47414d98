"""Nothing outside ddpo/models reaches into a diffusers pipeline or scheduler."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("ddpo", "tasks", "flows", "bench")
BARE = {"bench/floor.py", "bench/random_models.py"}
"""What measures the library against diffusers alone, and what writes pipelines to measure."""
_PRIVATE = {"pipeline", "unet", "vae", "scheduler", "text_encoder", "tokenizer", "transformer"}


def reaches(source: str) -> list[str]:
    """Return what a source has that only a model family may have; logging is anyone's."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] == "diffusers"]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] == "diffusers" and module != "diffusers.utils":
                found.append(module)
        elif isinstance(node, ast.Attribute) and node.attr in _PRIVATE:
            owner = ast.unparse(node.value)
            if owner.rpartition(".")[2] in _PRIVATE | {"policy"}:
                found.append(ast.unparse(node))
    return found


def test_only_model_families_touch_pipelines_and_schedulers() -> None:
    files = [file for room in ROOMS for file in sorted((REPOSITORY / room).rglob("*.py"))]
    files = [file for file in files if str(file.relative_to(REPOSITORY)) not in BARE]
    outside = [file for file in files if not file.is_relative_to(REPOSITORY / "ddpo" / "models")]
    assert 100 < len(outside) < len(files)
    found = {str(file): bad for file in outside if (bad := reaches(file.read_text()))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "policy.pipeline",
        "last = self.policy.pipeline.scheduler.config.num_train_timesteps",
        "def f():\n    return lease.policy.unet",
        "from diffusers import DDIMScheduler",
        "def f():\n    import diffusers",
    ],
)
def test_the_check_would_see_it(source: str) -> None:
    assert reaches(source)


@pytest.mark.parametrize(
    "source", ["policy.schedule", "self.tokenizer", "from diffusers.utils import logging"]
)
def test_the_check_lets_pass_what_is_no_pipeline(source: str) -> None:
    assert not reaches(source)
