"""Who created a page in MLflow, from what, at which commit: MLflow's own tags for it."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import sys
from pathlib import Path

from mlflow.entities import SourceType
from mlflow.utils.credentials import read_mlflow_creds
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_GIT_DIRTY,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)
from prefect.runtime import deployment, flow_run

_GIT_TIMEOUT_S = 5.0


def origin() -> dict[str, str]:
    """Return the tags of a page that say where it comes from; what is not known is left out.

    The commit is that of the working tree in which the command was called.
    """
    tags = {
        MLFLOW_SOURCE_NAME: _source(),
        MLFLOW_SOURCE_TYPE: SourceType.to_string(SourceType.LOCAL),
    }
    if user := _user():
        tags[MLFLOW_USER] = user
    if commit := git("rev-parse", "HEAD"):
        tags[MLFLOW_GIT_COMMIT] = commit
        changed = git("status", "--porcelain", "--untracked-files=no")
        tags[MLFLOW_GIT_DIRTY] = str(bool(changed)).lower()
    return tags


def git(*words: str, folder: Path | None = None) -> str:
    """Return what git prints; empty outside a working tree or without git.

    Args:
        words: What follows `git`.
        folder: Where to ask it; by default the current folder.
    """
    if shutil.which("git") is None:
        return ""
    try:
        asked = subprocess.run(
            ["git", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def _source() -> str:
    """Return the deployment, the command of `ddpo` without its arguments, or the program."""
    if deployment.name:
        return f"{flow_run.get_flow_name()}/{deployment.name}"
    program = Path(sys.argv[0])
    if program.name == "ddpo" and len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        return f"{program.name} {sys.argv[1]}"
    return str(program)


def _user() -> str:
    """Return the user's name at MLflow's server, else on this machine; empty if there is none."""
    try:
        return read_mlflow_creds().username or getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user may have no name
        return ""
