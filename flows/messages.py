"""Commands, as shown to users: they can be pasted into the shell that called this one."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpo.store.objects import Store

_NAME = "ddpo"
_NAMED = re.compile(rf"`{_NAME} (?=[a-z])")


def ddpo_command(*words: str) -> str:
    """Return a command of `ddpo` as it is called here.

    Args:
        words: What follows `ddpo`.
    """
    return shlex.join([_program(), *words])


def as_called(text: str) -> str:
    """Return a message of the library with the commands that it quotes as they are called here."""
    return _NAMED.sub(lambda _: f"`{ddpo_command()} ", text)


def store_command(store: Store, *words: str) -> str:
    """Return a command of `ddpo` that reads or writes a store.

    Args:
        store: The store.
        words: What stands between `ddpo` and the store's address.
    """
    command = ddpo_command(*words, "--root", store.root.removeprefix("file://"))
    for name, value in (store.s3.environment() if store.s3 else {}).items():
        command = f"{name}={shlex.quote(value)} {command}"
    return command


def resume_command(store: Store, run_id: str) -> str:
    """Return the shell command that resumes a run.

    No AWS variable selects a bucket's addressing style or turns off certificate checks, so a run
    that needs either can only be resumed with its config.

    Args:
        store: The store.
        run_id: The run's name.
    """
    if store.s3 and (store.s3.addressing_style != "auto" or not store.s3.verify_tls):
        return f"the same ddpo train command, with --run-id {shlex.quote(run_id)}"
    return store_command(store, "resume", run_id)


def ui_command(tracking: str, default: str) -> str:
    """Return the command that serves the page of a run.

    Args:
        tracking: MLflow's tracking URI of the run.
        default: The one that `ddpo ui` serves by default.
    """
    return ddpo_command("ui", *([] if tracking == default else ["--tracking", tracking]))


def _program() -> str:
    """Return what calls `ddpo` here: the name if the shell finds it, else the path of the script.

    A program that is not `ddpo`, such as a notebook or a worker, is taken for the script beside its
    Python.
    """
    called = Path(sys.argv[0])
    script = called if called.name == _NAME else Path(sys.executable).with_name(_NAME)
    found = shutil.which(_NAME)
    if not script.exists() or (found and Path(found).samefile(script)):
        return _NAME
    return str(script)
