"""A command that is printed can be pasted as it is into the shell that called `ddpo`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from ddpo.config.s3 import S3Options
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.messages import as_called, ddpo_command, resume_command, ui_command

DEFAULT = "sqlite:///ddpo-data/mlflow.db"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment's `ddpo`, called by its path as `make demo` does; it is not on PATH."""
    file = tmp_path / ".venv" / "bin" / "ddpo"
    file.parent.mkdir(parents=True)
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sys, "argv", [".venv/bin/ddpo", "runs"])
    return file


def on_path(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}/usr/bin")


def test_a_script_that_the_shell_does_not_find_is_named_by_its_path(script: Path) -> None:
    assert ddpo_command("ui") == ".venv/bin/ddpo ui"
    words = shlex.split(resume_command(Store.open("store"), "mine"))
    assert words == [".venv/bin/ddpo", "resume", "mine", "--root", str(Path.cwd() / "store")]


@pytest.mark.parametrize("called", ["ddpo", ".venv/bin/ddpo", "{}"])
def test_a_script_that_the_shell_finds_is_named_by_its_name(
    script: Path, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    on_path(script, monkeypatch)
    monkeypatch.setattr(sys, "argv", [called.format(script)])
    assert ddpo_command("ui") == "ddpo ui"


def test_another_installation_on_the_path_is_not_taken_for_this_one(
    script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "ddpo"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    on_path(other, monkeypatch)
    assert ddpo_command("ui") == ".venv/bin/ddpo ui"


def test_another_program_names_the_script_beside_its_python(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/prefect", "worker"])
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    assert ddpo_command("ui") == f"{script} ui"
    script.unlink()
    assert ddpo_command("ui") == "ddpo ui"


def test_a_path_with_spaces_is_quoted(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = script.rename(script.parent.parent / "ddpo")
    folder = spaced.parent.rename(spaced.parent.parent / "my venv")
    monkeypatch.setattr(sys, "argv", [str(folder / "ddpo")])
    assert shlex.split(ddpo_command("ui")) == [str(folder / "ddpo"), "ui"]


def test_what_a_bucket_needs_stands_before_the_command(script: Path) -> None:
    store = Store.open("s3://bucket/a", S3Options(endpoint_url="http://127.0.0.1:9"))
    start, _, rest = resume_command(store, "mine").partition(" .venv/bin/ddpo ")
    assert "AWS_ENDPOINT_URL=http://127.0.0.1:9" in start
    assert rest == "resume mine --root s3://bucket/a"


def test_the_page_is_served_from_the_database_that_the_run_was_shown_in(script: Path) -> None:
    assert ui_command(DEFAULT, DEFAULT) == ".venv/bin/ddpo ui"
    other = ui_command("sqlite:////data/mlflow.db", DEFAULT)
    assert other == ".venv/bin/ddpo ui --tracking sqlite:////data/mlflow.db"


def test_commands_within_the_librarys_messages_are_named_too(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/ddpo", "gc", "nothing", "--root", "store"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "`.venv/bin/ddpo runs` lists" in " ".join(capsys.readouterr().out.split())
    assert as_called("the `ddpo` command; `ddpo runs`") == (
        "the `ddpo` command; `.venv/bin/ddpo runs`"
    )
