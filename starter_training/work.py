"""What a training run is asked to do, and the folder that it works in."""

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
    """The work folder holds another run, or one that was not meant to be continued."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights' bytes, on one machine.

    Attributes:
        seed: of every draw.
        cached_pictures: how many different pictures there are to train each model on.
        vae: the autoencoder's budget.
        judge: the judge's budget.
        unet: budget of noise predictor and text encoder.
    """

    seed: int
    cached_pictures: int
    vae: Budget
    judge: Budget
    unet: Budget

    def as_json(self) -> dict[str, Any]:
        """Returns the recipe as nested dictionaries."""
        return asdict(self)

    @property
    def command(self) -> str:
        """What a shell is told to make the weights again; learning rates and batches are fixed."""
        return (
            f"python -m starter_training.train --seed {self.seed} "
            f"--cached-pictures {self.cached_pictures} --vae-pictures {self.vae.pictures} "
            f"--judge-pictures {self.judge.pictures} --unet-pictures {self.unet.pictures}"
        )


class WorkFolder(NamedTuple):
    """Where the files of a training run lie."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe, as JSON."""
        return self.root / "recipe.json"

    @property
    def journal(self) -> Path:
        """Of each stage: commits, seconds, and whether it is done, as JSON."""
        return self.root / "journal.json"

    @property
    def pictures(self) -> Path:
        """Of the generator: uint8 [N, 64, 64, 3]."""
        return self.root / "pictures.npy"

    @property
    def judge_pictures(self) -> Path:
        """Of the judge: uint8 [N, 64, 64, 3], held-out pairs among them."""
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
        """`latents` [N, 16, 8, 8], whitened, with `mean` and `std` [16] from before."""
        return self.root / "latents.safetensors"

    @property
    def unet(self) -> Path:
        """Checkpoint of noise predictor and text encoder."""
        return self.root / "unet.safetensors"

    def claim(self, recipe: Recipe, resume: bool) -> None:
        """Makes the folder this run's own.

        Args:
            recipe: of this run.
            resume: whether to continue the run that lies there.

        Raises:
            WorkFolderError: it holds a run and `resume` is False, or one of another recipe.
        """
        if not self.recipe.exists():
            write_json(self.recipe, recipe.as_json())
            return
        found, asked = json.loads(self.recipe.read_text()), recipe.as_json()
        if not resume:
            raise WorkFolderError(
                f"{self.root} holds a run already: add --resume to continue it, "
                "or name another --work"
            )
        if found != asked:
            differing = {
                key: (found.get(key), asked[key]) for key in asked if found.get(key) != asked[key]
            }
            raise WorkFolderError(
                f"{self.root} holds a run of another recipe (found, asked): {differing}; "
                "resume it with its own options, or name another --work"
            )

    def read_recipe(self) -> Recipe:
        """Reads the recipe of the run that lies here.

        Raises:
            WorkFolderError: no run lies here.
        """
        if not self.recipe.exists():
            raise WorkFolderError(f"{self.root} holds no run; train one there first")
        found = json.loads(self.recipe.read_text())
        budgets = {name: Budget(**found[name]) for name in ("vae", "judge", "unet")}
        return Recipe(**{**found, **budgets})

    def read_journal(self) -> dict[str, Any]:
        """Reads what is known of the stages, by their names."""
        return json.loads(self.journal.read_text()) if self.journal.exists() else {}

    def finished(self) -> set[str]:
        """Returns the names of the stages that are done."""
        return {name for name, entry in self.read_journal().items() if entry["done"]}

    @contextmanager
    def noting(self, stage: str, commit: str) -> Iterator[None]:
        """Writes down in the journal how long a stage took and what code ran it.

        A stage that a resume continues adds up its seconds and keeps the commits of all its parts.
        What was spent after the last checkpoint of a part that was killed is not in it.

        Args:
            stage: its name.
            commit: of the code, as the process loaded it.
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
    """Returns the git commit of this code, with '+' if files differ from it; else 'unknown'."""

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
