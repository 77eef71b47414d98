"""The process of Prefect's temporary server.

It prints two lines: the port that it is going to listen on, or that Prefect's settings name another
server or allow no temporary one; then, that its database is open, or why it is not.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from ddpo_workflow.flows.cli.temporary_server import CONFIGURED, FAILED

_MIGRATION_S = 300.0
"""How long to wait for another process that creates or migrates the database, in seconds."""

_UNKNOWN_REVISION = "locate revision"
"""In alembic's message about a database that a newer version has migrated further."""


def main() -> None:
    """Serve until SIGTERM, or until the process that has started this one ends."""
    gc.disable()  # until all is imported: an eighth of the time
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url or not settings.server.ephemeral.enabled:
        _say(CONFIGURED)
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    _say(str(listener.getsockname()[1]))
    import uvicorn
    from prefect.server.api.server import create_app

    try:
        # The server's own first step. If that fails, the server ends without a word.
        asyncio.run(open_database())
    except Exception as error:
        _say(f"{FAILED} {_reason(error)}")
        sys.exit(1)
    _say("open")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads on
    app = create_app()
    gc.freeze()
    gc.enable()
    config = uvicorn.Config(app, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[listener])


async def open_database() -> None:
    """Open Prefect's database, created and migrated if necessary.

    Prefect itself takes no lock: of two processes that start on a new folder at once, one adds a
    column that the other has just added, and fails.
    """
    from filelock import FileLock
    from prefect.server.database import provide_database_interface
    from prefect.settings import PREFECT_HOME

    lock = Path(str(PREFECT_HOME.value())) / "ddpo-database.lock"
    with FileLock(lock, timeout=_MIGRATION_S):
        await provide_database_interface().create_db()


def _reason(error: Exception) -> str:
    """Return why the database cannot be opened, in one line."""
    import prefect
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    from ddpo.basics.redaction import hide_credentials

    database = hide_credentials(str(PREFECT_API_DATABASE_CONNECTION_URL.value()))
    reason = hide_credentials(str(error)).partition("\n")[0]
    if _UNKNOWN_REVISION in reason:
        return (
            f"Prefect's database {database} was written by a newer version than the "
            f"{prefect.__version__} that is installed ({reason}). Install that version, or use "
            "another database: PREFECT_HOME=FOLDER"
        )
    return (
        f"Prefect's database {database} cannot be opened: {type(error).__name__}: {reason}. Use a "
        "folder that can be written: PREFECT_HOME=FOLDER"
    )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
