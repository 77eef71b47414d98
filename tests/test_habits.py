"""What is checked before a change lands is the same by hand, at a commit and on a runner."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
MAKEFILE = (REPOSITORY / "Makefile").read_text()


def recipe(target: str) -> str:
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert found is not None, target
    return found[1]


def test_help_names_every_target_that_is_phony() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(
        ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^  make (\S+) +\S", shown, re.MULTILINE) == phony[1].split()


def test_a_runner_and_a_commit_check_what_make_does() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yaml").read_text())
    job = workflow["jobs"]["test"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    script = (REPOSITORY / ".ci/run").read_text().splitlines()
    assert script[-2:] == ["make lint", "make test"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"] == [oldest, "3.12"]
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0][
        "hooks"
    ]
    commands = [hook["entry"].removeprefix(".venv/bin/").split()[:2] for hook in hooks]
    linted = re.findall(r"\$\(BIN\)/(ruff \w+|pyright)", recipe("lint"))
    assert commands == [command.split() for command in linted]


@pytest.mark.parametrize("target", ["check", "lint"])
def test_style_format_and_types_are_all_checked(target: str) -> None:
    for tool in ("ruff check .", "ruff format --check .", "pyright"):
        assert f"$(BIN)/{tool}" in recipe(target)


def test_constraints_are_exact() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 100
    assert not [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.!]+", pin)]
