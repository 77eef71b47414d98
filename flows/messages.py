"""The command that resumes a run, as shown to users."""

from __future__ import annotations

import shlex

from ddpo.store.objects import Store


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
    command = shlex.join(["ddpo", "resume", run_id, "--root", store.root.removeprefix("file://")])
    for name, value in (store.s3.environment() if store.s3 else {}).items():
        command = f"{name}={shlex.quote(value)} {command}"
    return command
