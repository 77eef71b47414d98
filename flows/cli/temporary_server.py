"""Prefect's temporary server; if it cannot start, the cause is reported at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import prefect
from filelock import FileLock
from prefect.client.orchestration import get_client
from prefect.server.database import provide_database_interface
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_HOME

from ddpo.basics.redaction import hide_credentials
from ddpo.errors import DdpoError

_MIGRATION_S = 300.0
"""How long to wait for another process that creates or migrates the database, in seconds."""

_UNKNOWN_REVISION = "locate revision"
"""In alembic's message about a database that a newer version has migrated further."""


class ServerNotStarted(DdpoError):
    """Prefect's temporary server did not start; the message says why."""


def start_temporary_server() -> None:
    """Start Prefect's temporary server, for this process.

    Raises:
        ServerNotStarted: Its database cannot be opened, or it did not answer in time.
    """
    try:
        # The server's own first step. If that fails, Prefect restarts the server silently for two
        # minutes.
        asyncio.run(open_database())
    except Exception as error:
        raise _unusable_database(error) from error
    try:
        get_client(sync_client=True)
    except RuntimeError as error:
        raise ServerNotStarted(
            f"Prefect's temporary server did not start: {hide_credentials(str(error))} Run "
            "`prefect server start` to see why, and set PREFECT_API_URL to use that server"
        ) from error


async def open_database() -> None:
    """Open Prefect's database, created and migrated if necessary.

    Prefect itself takes no lock: of two processes that start on a new folder at once, one adds a
    column that the other has just added, and fails.
    """
    lock = Path(str(PREFECT_HOME.value())) / "ddpo-database.lock"
    with FileLock(lock, timeout=_MIGRATION_S):
        await provide_database_interface().create_db()


def _unusable_database(error: Exception) -> ServerNotStarted:
    database = hide_credentials(str(PREFECT_API_DATABASE_CONNECTION_URL.value()))
    reason = hide_credentials(str(error)).partition("\n")[0]
    if _UNKNOWN_REVISION in reason:
        return ServerNotStarted(
            f"Prefect's database {database} was written by a newer version than the "
            f"{prefect.__version__} that is installed ({reason}). Install that version, or use "
            "another database: PREFECT_HOME=FOLDER"
        )
    return ServerNotStarted(
        f"Prefect's database {database} cannot be opened: {type(error).__name__}: {reason}. Use a "
        "folder that can be written: PREFECT_HOME=FOLDER"
    )
