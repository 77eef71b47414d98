from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from ddpo.config.s3 import S3Options
from ddpo.store import objects
from ddpo.store.objects import Store
from tests.servers import BUCKET, ObjectStore


@contextmanager
def opened(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[Store]:
    if kind == "local":
        yield Store.open(str(folder / "store"))
    elif kind == "memory":
        root = f"memory://{uuid.uuid4().hex}"
        yield Store.open(root)
        fs, path = fsspec.core.url_to_fs(root)
        if fs.exists(path):
            fs.rm(path, recursive=True)
    else:
        server: ObjectStore = request.getfixturevalue(kind)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            # An endpoint of its own keeps fsspec from handing out the other server's client.
            options = S3Options(endpoint_url=server.endpoint_url)
            yield Store.open(f"s3://{BUCKET}/{uuid.uuid4().hex}", options)


@pytest.fixture(params=["local", "memory", "seaweedfs", "moto"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with opened(request.param, request, tmp_path) as found:
        yield found


@pytest.fixture(params=["local", "memory", "seaweedfs"])
def raced_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Not moto: it looks whether an object is there and puts it in two steps."""
    with opened(request.param, request, tmp_path) as found:
        yield found


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
