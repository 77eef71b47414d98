"""`ddpo train` killed at random times, or its object store; what comes out is the same."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ddpo.basics.digests import tensors_digest
from tests import servers
from tests.faults.crashes import RUN, Night
from tests.faults.processes import LIMIT_S, Command, kill
from tests.servers import BUCKET

MOST_KILLS = 2
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(1, 20))]
SERVER_SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(1, 5))]

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    content: dict[str, bytes]
    metrics: dict[str, list[Any]]
    adapter: str

    @classmethod
    def of(cls, command: Command) -> Outcome:
        (file,) = (command.folder / "outputs" / RUN / "lora").glob("*.safetensors")
        shown = {
            name: values
            for name, values in command.night.metrics().items()
            if not name.startswith("time/")
        }
        return cls(command.night.content(), shown, tensors_digest(load_file(file)))

    @property
    def manifests(self) -> list[str]:
        return [key for key in self.content if key.startswith("manifests/")]

    def check_same(self, other: Outcome) -> None:
        assert self.content.keys() == other.content.keys()
        for key, data in self.content.items():
            assert other.content[key] == data, key
        assert self.metrics == other.metrics
        assert self.adapter == other.adapter


@pytest.fixture(scope="module")
def plan(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Command]:
    def of(name: str, root: str | None = None, **environment: str) -> Command:
        folder = tmp_path_factory.mktemp("sigkill") / name
        night = Night.plan(
            tiny_model,
            root or str(folder / "store"),
            folder,
            mlflow_database,
            outputs=str(folder / "outputs"),
            epochs=3,
        )
        return Command(night, folder, environment)

    return of


@pytest.fixture(scope="module")
def whole(plan: Callable[..., Command]) -> Outcome:
    command = plan("whole")
    assert command.run() == 0, command.log.read_text()
    return Outcome.of(command)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    plan: Callable[..., Command], whole: Outcome, prefect_api: dict[str, str], seed: int
) -> None:
    chance = random.Random(seed)
    # Every other one with Prefect servers of its own, which are killed with it.
    command = plan(f"killed-{seed}", **({} if seed % 2 else prefect_api))
    kills = 0
    while kills < MOST_KILLS:
        # Anywhere from the first commit on; nothing is written before.
        last = len(whole.manifests) - 1
        until = chance.randint(min(command.manifests(), last), last)
        if not command.run_until_killed(until, chance.uniform(0, 0.5)):
            break
        kills += 1
    else:
        assert command.run() == 0, command.log.read_text()
    assert kills
    Outcome.of(command).check_same(whole)


@pytest.mark.parametrize("seed", SERVER_SEEDS)
def test_a_run_whose_object_store_is_killed_and_restarted_ends_in_the_same_bytes(
    plan: Callable[..., Command],
    whole: Outcome,
    prefect_api: dict[str, str],
    tmp_path: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance = random.Random(seed)
    with servers.seaweedfs(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        command = plan(f"server-{seed}", f"s3://{BUCKET}/night", **prefect_api)
        process = command.start()
        try:
            until = chance.randint(1, len(whole.manifests) - 1)
            while command.manifests() < until:
                assert process.poll() is None, command.log.read_text()
                time.sleep(0.05)
            os.kill(server.pid, signal.SIGKILL)
            time.sleep(chance.uniform(0.5, 3.0))
            with servers.seaweedfs(tmp_path, again=server):
                status = process.wait(LIMIT_S)
                starts = 1
                while status and starts < 4:
                    assert status in (1, 2), command.log.read_text()
                    status, starts = command.run(), starts + 1
                assert status == 0, command.log.read_text()
                Outcome.of(command).check_same(whole)
        finally:
            kill(process)
