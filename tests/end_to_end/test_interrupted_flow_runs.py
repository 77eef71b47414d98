"""Runs on a real server and worker: started by a schedule, cancelled and retried, taken over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from ddpo.runs import open_run
from ddpo.store import keys
from ddpo.store.objects import Store
from ddpo_workflow.flows.automations import mark_dead_flow_runs
from ddpo_workflow.flows.server.deploy import deploy
from tests.end_to_end.test_dead_flow_runs import BEAT_S, HELD_REWARD, SILENCE_S
from tests.end_to_end.test_deployment import Operator, check_whole, process
from tests.prefect_homes import prefect_home
from tests.servers import free_port
from tests.tiny import tiny_config

LIMIT_S = 900.0
TRAIN = "ddpo-train/train"
RUN = "night"


class Night:
    """A run with a reward that waits as long as there is a file `hold`."""

    def __init__(self, operator: Operator, model: Path, folder: Path) -> None:
        self.operator, self.folder = operator, folder
        self.client = SyncPrefectClient(f"{operator.address}/api")
        self.config = tiny_config(
            model,
            reward={"name": "held:score"},
            sampler={"steps": 2},
            outputs=str(folder / "outputs"),
            epochs=2,
        )
        self.file = folder / "config.yaml"
        self.file.write_text(yaml.safe_dump(self.config.model_dump(mode="json")))

    def start(self, name: str, run_id: str | None = RUN) -> UUID:
        """Start the run in a store of that name, as the form does; returns the flow run."""
        found = self.client.read_deployment_by_name(TRAIN)
        return self.client.create_flow_run_from_deployment(
            found.id, parameters=self.parameters(name) | {"run_id": run_id}
        ).id

    def parameters(self, name: str) -> dict[str, str]:
        return {
            "config_file": str(self.file),
            "storage": self.store(name).root,
            "tracking": self.uri(name),
        }

    def store(self, name: str) -> Store:
        return Store.open(str(self.folder / name / "store"))

    def uri(self, name: str) -> str:
        return f"sqlite:///{self.folder}/{name}/mlflow.db"

    def content(self, name: str) -> dict[str, bytes]:
        """All that is stored, by key; the records of starts differ by nature."""
        store, starts = self.store(name), keys.starts_prefix(RUN)
        return {key: store.read(key) for key in store.list() if not key.startswith(starts)}

    def hold(self) -> None:
        (self.folder / "held").unlink(missing_ok=True)
        (self.folder / "hold").touch()

    def held(self) -> bool:
        return (self.folder / "held").exists()

    def let_go(self) -> None:
        (self.folder / "hold").unlink()

    def until(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < deadline, self.operator.tails()
            time.sleep(0.2)

    def ended(self, flow_run: UUID) -> FlowRun:
        """Wait until a flow run has ended; returns it."""
        self.until(lambda: self.client.read_flow_run(flow_run).state.is_final())
        return self.client.read_flow_run(flow_run)


@contextmanager
def worker(operator: Operator, folder: Path) -> Iterator[None]:
    with process(operator, folder, "worker", "worker", "start", "-p", "ddpo-gpu"):
        yield


@pytest.fixture(scope="module")
def night(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    """A server of these tests' own, and a run that has ended undisturbed, named `whole`."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "held.py").write_text(HELD_REWARD)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_LOGGING_")},
        "PREFECT_HOME": prefect_home(folder / "prefect"),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(BEAT_S),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    operator = Operator(address, environment)
    server = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    with process(operator, folder, "server", *server, url=f"{address}/api/health"):
        deploy(f"{address}/api", tracking=None)
        with temporary_settings({PREFECT_API_URL: f"{address}/api"}):
            mark_dead_flow_runs(SILENCE_S)
        made = Night(operator, tiny_model, folder)
        with worker(operator, folder):
            assert made.ended(made.start("whole")).state.is_completed(), operator.tails()
        yield made


@pytest.mark.faults
def test_a_run_that_is_cancelled_in_the_ui_stops_and_retry_resumes_it(night: Night) -> None:
    night.hold()
    with worker(night.operator, night.folder):
        flow_run = night.start("cancelled")
        night.until(night.held)
        program = night.client.read_flow_run(flow_run).infrastructure_pid
        assert program is not None
        pid = int(program.rpartition(":")[2])
        asked = time.monotonic()
        night.client.set_flow_run_state(flow_run, State(type=StateType.CANCELLING))
        night.until(lambda: not psutil.pid_exists(pid))
        ended = time.monotonic() - asked
        assert night.ended(flow_run).state.is_cancelled()
        print(f"process ended in {ended:.0f} s, cancelled in {time.monotonic() - asked:.0f} s")
        assert not night.store("cancelled").exists(keys.lease_key(RUN))
        night.let_go()
        again = State(type=StateType.SCHEDULED, name="AwaitingRetry")
        night.client.set_flow_run_state(flow_run, again, force=True)
        night.until(lambda: night.client.read_flow_run(flow_run).state.is_completed())
    assert night.content("cancelled") == night.content("whole")
    check_whole(night.store("cancelled"), night.uri("cancelled"), RUN, epochs=2)


def test_a_run_whose_worker_is_killed_is_taken_over(night: Night) -> None:
    night.hold()
    with ExitStack() as stack:
        stack.enter_context(worker(night.operator, night.folder))
        flow_run = night.start("killed")
        night.until(night.held)
        program = night.client.read_flow_run(flow_run).infrastructure_pid
        assert program is not None
        run = psutil.Process(int(program.rpartition(":")[2]))
        parent = run.parent()
        assert parent is not None
        for each in (parent, run, *run.children(recursive=True)):
            each.send_signal(signal.SIGKILL)
    assert night.store("killed").exists(keys.lease_key(RUN))
    night.let_go()
    with worker(night.operator, night.folder):
        # The pool has room for one run: the dead one is marked as crashed first.
        assert night.ended(night.start("killed")).state.is_completed(), night.operator.tails()
    assert night.client.read_flow_run(flow_run).state.is_crashed()
    assert night.content("killed") == night.content("whole")
    check_whole(night.store("killed"), night.uri("killed"), RUN, epochs=2)


def test_a_schedule_starts_a_run_with_the_date_as_its_seed(night: Night) -> None:
    deployment = night.client.read_deployment_by_name(TRAIN)
    first = datetime.now(UTC) + timedelta(seconds=90)  # the server looks for work once a minute
    created = night.client._client.post(
        f"/deployments/{deployment.id}/schedules",
        json=[
            {
                "schedule": IntervalSchedule(
                    interval=timedelta(days=1), anchor_date=first
                ).model_dump(mode="json"),
                "active": True,
                "parameters": night.parameters("scheduled") | {"seed_of_date": True},
            }
        ],
    )
    created.raise_for_status()

    def scheduled() -> list[FlowRun]:
        runs = night.client.read_flow_runs()
        return [run for run in runs if run.auto_scheduled and run.expected_start_time <= first]

    with worker(night.operator, night.folder):
        night.until(scheduled)
        (flow_run,) = scheduled()
        ended = night.ended(flow_run.id)
        assert ended.state.is_completed(), night.operator.tails()
    run = open_run(night.store("scheduled"), ended.name)
    assert run.config.seed == int(f"{first:%Y%m%d}")
