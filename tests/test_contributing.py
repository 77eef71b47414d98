"""The worked examples of CONTRIBUTING.md: applied to a copy of the code, checked, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("\n## Worked examples\n")[2]
BLOCK = re.compile(r"^```(python|diff)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    section.partition("\n")[0]: BLOCK.findall(section)
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
}
RUFF = Path(sys.executable).with_name("ruff")
LONG = {"Add a model family", "Add an MLflow metric"}  # their checks load a model, or train it


def change(root: Path, diff: str) -> Path:
    """Apply a diff to one file, whose hunks say by their text alone where they belong."""
    header, *hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)
    file = root / re.findall(r"^\+\+\+ b/(\S+)$", header, re.MULTILINE)[0]
    text = file.read_text()
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if not line.startswith("+"))
        after = "".join(line[1:] for line in lines if not line.startswith("-"))
        assert text.count(before) == 1, f"{file} has not once:\n{before}"
        text = text.replace(before, after)
    file.write_text(text)
    return file


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is installed; the starter's weights are only linked."""
    weights = shutil.ignore_patterns("__pycache__", "weights", "judge_weights")
    for folder in ("ddpo", "tasks", "flows", "ddpo_workflow"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, symlinks=True, ignore=weights)
    for name in ("weights", "judge_weights"):
        (tmp_path / "ddpo/starter" / name).symlink_to(REPOSITORY / "ddpo/starter" / name)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_there_is_an_example_of_everything_that_is_often_added() -> None:
    assert list(EXAMPLES) == [
        "Add a reward",
        "Add a prompt set",
        "Add an algorithm",
        "Add a model family",
        "Add an MLflow metric",
    ]


@pytest.mark.parametrize(
    "title",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in EXAMPLES],
)
def test_an_example_works_as_written(title: str, checkout: Path) -> None:
    changed, checks = [], []
    for language, place, text in EXAMPLES[title]:
        if language == "diff":
            changed.append(change(checkout, text))
        elif place:
            file = checkout / place
            assert not file.exists()
            file.write_text(text)
            changed.append(file)
        else:
            checks.append(text)
    assert 1 <= len(changed) <= 2  # source files
    (check,) = checks
    run = [sys.executable, "-c", check]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(run, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for linter in (["check"], ["format", "--check"]):
        subprocess.run([RUFF, *linter, *changed], cwd=checkout, check=True)


@pytest.mark.slow
def test_an_example_fails_without_its_change(checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    for title, blocks in EXAMPLES.items():
        if title != "Add an MLflow metric":
            run = [sys.executable, "-c", blocks[-1][2]]
            done = subprocess.run(run, cwd=checkout, env=environment, capture_output=True)
            assert done.returncode != 0, title
