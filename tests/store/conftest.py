from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from ddpo.store import objects
from ddpo.store.objects import Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store.open(str(tmp_path / "store"))
        return
    root = f"memory://{uuid.uuid4().hex}"
    yield Store.open(root)
    fs, path = fsspec.core.url_to_fs(root)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return Store.open((tmp_path / "store").as_uri())


@pytest.fixture
def memory_store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script in a fresh interpreter that can import ddpo and this folder."""
    started: list[subprocess.Popen[str]] = []
    repository = Path(objects.__file__).parents[2]

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(repository), str(Path(__file__).parent)])
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
