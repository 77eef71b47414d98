"""Homes of Prefect whose database is there already: creating one takes many seconds of CPU."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_CREATE = """
import asyncio
from prefect.server.database import provide_database_interface

asyncio.run(provide_database_interface().create_db())
"""

_folder = tempfile.TemporaryDirectory(prefix="ddpo-tests-prefect-", ignore_cleanup_errors=True)


def prefect_home(folder: Path) -> str:
    """Return a folder as PREFECT_HOME; it gets an empty database if it has none.

    Args:
        folder: Made if necessary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "prefect.db").exists():
        shutil.copy(_empty_database(), folder / "prefect.db")
    return str(folder)


@functools.cache
def _empty_database() -> Path:
    environment = {**os.environ, "PREFECT_HOME": _folder.name}
    subprocess.run([sys.executable, "-c", _CREATE], env=environment, check=True)
    return Path(_folder.name, "prefect.db")
