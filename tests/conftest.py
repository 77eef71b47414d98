from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from s3fs import S3FileSystem

from ddpo_workflow.flows.cli.quiet import set_defaults
from tests import servers
from tests.servers import ObjectStore

set_defaults()
# Flows that run in this process start their temporary server in a home of the tests' own.
_home = tempfile.TemporaryDirectory(prefix="ddpo-tests-", ignore_cleanup_errors=True)
os.environ["PREFECT_HOME"] = _home.name
# What the tests' runs are trusted to name is remembered there too.
os.environ["XDG_STATE_HOME"] = f"{_home.name}/state"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a defect

# After the environment is set.
import torch  # noqa: E402

from ddpo.config import RunConfig  # noqa: E402
from ddpo.models import Policy  # noqa: E402
from ddpo.training.samples import Rollouts  # noqa: E402
from tests.tiny import (  # noqa: E402
    build_tiny_model,
    draw,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)

with suppress(ImportError):
    from playwright.sync_api import expect

    expect.set_options(timeout=120_000)  # a slow machine is not a fault

# Tiny models lose more by threads than they win; and equal threads give equal bytes.
torch.set_num_threads(1)


FOLDERS = {"cuda": "slow", "end_to_end": "e2e", "faults": "slow"}  # marks of all that is in them
SERVERS = {"seaweedfs", "moto"}
LENGTHS = {"servers": 1, "slow": 4, "e2e": 16}  # about how many seconds a test of each mark takes


# First, so that the marks are there when `-m` selects.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what a place or a fixture says, and let long modules come first.

    Each process takes one module after another. With the long ones at the end, one process would
    be left with the last of them, and the other with nothing.
    """
    for item in items:
        if mark := FOLDERS.get(item.path.parent.name):
            item.add_marker(mark)
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if SERVERS & {*item.fixturenames, *(p for p in parameters if isinstance(p, str))}:
            item.add_marker("servers")
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    length: Counter[Path] = Counter()
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        length[item.path] += max(LENGTHS.get(mark, 0) for mark in marks | {""})
    items.sort(key=lambda item: -length[item.path])


@pytest.fixture(autouse=True)
def clients_of_its_own() -> None:
    """Forget clients of S3 servers: their cache does not see that the environment has changed."""
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """SeaweedFS, one server for all tests; each takes a prefix of its own."""
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as up:
        yield up


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """moto's S3 server, likewise."""
    with servers.moto(tmp_path_factory.mktemp("moto")) as up:
        yield up


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline that predicts epsilon, shipped with PNDM as SD 1.x is."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "epsilon")


@pytest.fixture(scope="session")
def tiny_v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline that predicts v, shipped with DDIM as SD 2.x is."""
    folder = tmp_path_factory.mktemp("tiny") / "v"
    return build_tiny_model(folder, prediction_type="v_prediction", seed=1)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, to be copied."""
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def config(tiny_model: Path) -> RunConfig:
    return tiny_config(tiny_model)


@pytest.fixture
def policy(config: RunConfig) -> Policy:
    policy = load_policy(config)
    grow_adapter(policy)
    return policy


@pytest.fixture
def rollouts(policy: Policy, config: RunConfig) -> Rollouts:
    return rollouts_of(draw(policy, config))
