"""The recipe of a training run, and its work folder."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from starter_training.loop import Budget, write_json


class WorkFolderError(Exception):
    """The work folder contains another run, or one that must be resumed explicitly."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights' bytes, on one machine."""

    seed: int
    """Seed of all randomness."""
    cached_pictures: int
    """Number of distinct images for each model."""
    vae: Budget
    """Of the autoencoder."""
    judge: Budget
    """Of the judge."""
    unet: Budget
    """Of noise predictor and text encoder."""

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as nested dictionaries."""
        return asdict(self)

    @property
    def command(self) -> str:
        """The command that reproduces the weights; learning rates and batches are fixed."""
        return (
            f"python -m starter_training.train --seed {self.seed} "
            f"--cached-pictures {self.cached_pictures} --vae-pictures {self.vae.pictures} "
            f"--judge-pictures {self.judge.pictures} --unet-pictures {self.unet.pictures}"
        )


@dataclass(frozen=True)
class FlowRecipe:
    """All that decides the bytes of the flow starter's weights, on one machine."""

    seed: int
    """Seed of all randomness."""
    cached_pictures: int
    """Number of distinct images."""
    flow: Budget
    """Of velocity predictor and text encoders."""

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as nested dictionaries."""
        return asdict(self)

    @property
    def command(self) -> str:
        """The command that reproduces the weights; learning rate and batch are fixed."""
        return (
            f"python -m starter_training.train --flow --seed {self.seed} "
            f"--cached-pictures {self.cached_pictures} --flow-pictures {self.flow.pictures}"
        )


class WorkFolder(NamedTuple):
    """The files of a training run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe, as JSON."""
        return self.root / "recipe.json"

    @property
    def journal(self) -> Path:
        """Commits, seconds and completion of each stage, as JSON."""
        return self.root / "journal.json"

    @property
    def pictures(self) -> Path:
        """Images of the generator, uint8 [N, 64, 64, 3]."""
        return self.root / "pictures.npy"

    @property
    def judge_pictures(self) -> Path:
        """Images of the judge, including held-out pairs, uint8 [N, 64, 64, 3]."""
        return self.root / "judge_pictures.npy"

    @property
    def vae(self) -> Path:
        """Checkpoint of the autoencoder."""
        return self.root / "vae.safetensors"

    @property
    def judge(self) -> Path:
        """Checkpoint of the judge."""
        return self.root / "judge.safetensors"

    @property
    def latents(self) -> Path:
        """Whitened `latents` [N, 16, 8, 8], with their original `mean` and `std` [16]."""
        return self.root / "latents.safetensors"

    @property
    def unet(self) -> Path:
        """Checkpoint of noise predictor and text encoder."""
        return self.root / "unet.safetensors"

    @property
    def flow(self) -> Path:
        """Checkpoint of velocity predictor and text encoders."""
        return self.root / "flow.safetensors"

    def claim(self, recipe: Recipe | FlowRecipe, resume: bool) -> None:
        """Claim the folder for a run.

        Args:
            recipe: The recipe of the run.
            resume: Whether to resume the run in the folder.

        Raises:
            WorkFolderError: It contains a run and `resume` is False, or the recipes differ.
        """
        if not self.recipe.exists():
            write_json(self.recipe, recipe.as_json())
            return
        stored, given = json.loads(self.recipe.read_text()), recipe.as_json()
        if not resume:
            raise WorkFolderError(
                f"{self.root} already contains a run: add --resume to resume it, or choose another "
                "--work"
            )
        if stored != given:
            differing = {
                key: (stored.get(key), given[key]) for key in given if stored.get(key) != given[key]
            }
            raise WorkFolderError(
                f"{self.root} contains a run of another recipe (stored, given): {differing}; "
                "resume it with its own options, or choose another --work"
            )

    def read_recipe(self) -> Recipe | FlowRecipe:
        """Read the recipe of the run in the folder.

        Raises:
            WorkFolderError: There is no run in the folder.
        """
        if not self.recipe.exists():
            raise WorkFolderError(f"{self.root} contains no run; train one there first")
        stored = json.loads(self.recipe.read_text())
        kind, names = (
            (FlowRecipe, ("flow",)) if "flow" in stored else (Recipe, ("vae", "judge", "unet"))
        )
        return kind(**{**stored, **{name: Budget(**stored[name]) for name in names}})

    def read_journal(self) -> dict[str, Any]:
        """Read the journal: what is known about each stage, by its name."""
        return json.loads(self.journal.read_text()) if self.journal.exists() else {}

    def finished(self) -> set[str]:
        """Return the names of the stages that are done."""
        return {name for name, entry in self.read_journal().items() if entry["done"]}

    @contextmanager
    def noting(self, stage: str, commit: str) -> Iterator[None]:
        """Record in the journal how long a stage took and which code ran it.

        A resumed stage adds up its seconds and keeps the commits of all its parts. Time spent after
        the last checkpoint before a kill is not included.

        Args:
            stage: Name of the stage.
            commit: Commit of the code, as loaded by the process.
        """
        before = self.read_journal().get(stage, {"commits": [], "seconds": 0})
        entry = {
            "commits": [*before["commits"], *([commit] if commit not in before["commits"] else [])],
            "seconds": before["seconds"],
            "done": False,
        }
        write_json(self.journal, {**self.read_journal(), stage: entry})
        started = time.monotonic()
        try:
            yield
            entry["done"] = True
        finally:
            entry["seconds"] += round(time.monotonic() - started)
            write_json(self.journal, {**self.read_journal(), stage: entry})


def source_commit() -> str:
    """Return the git commit of this code, with '+' if files differ from it; else 'unknown'."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    # What the weights depend on: code and glyphs, not the texts and weights beside them.
    sources = (
        ":(top)ddpo/basics/randomness.py",
        ":(top,glob)ddpo/starter/**/*.py",
        ":(top,glob)starter_training/**/*.py",
        ":(top)ddpo/starter/glyphs.png",
    )
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", *sources) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
