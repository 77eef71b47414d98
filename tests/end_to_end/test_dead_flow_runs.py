"""A flow run whose process died is marked as crashed, as `prefect deploy` has told the server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import Automation, EventTrigger
from prefect.settings import PREFECT_API_URL, temporary_settings

from ddpo_workflow.flows import automations
from ddpo_workflow.flows.server.deploy import deploy
from tests.end_to_end.test_deployment import Operator, process
from tests.faults.processes import kill
from tests.prefect_homes import prefect_home
from tests.servers import free_port
from tests.tiny import tiny_config

LIMIT_S = 900.0
BEAT_S = 30  # the shortest that Prefect allows
SILENCE_S = 90.0

HELD_REWARD = """
import pathlib, time
from prefect.runtime import task_run

here = pathlib.Path(__file__).parent

def score(images, prompts):
    if task_run.get_id() and (here / "hold").exists():
        (here / "held").touch()
        time.sleep(600)
    return [float(image.convert("L").getextrema()[1]) for image in images]
"""

TRAIN = """
import sys
from ddpo_workflow.flows.train import train

train(sys.argv[1], run_id="night", epochs=int(sys.argv[2]))
"""


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    """A server of this test's own."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_LOGGING_")},
        "PREFECT_HOME": prefect_home(tmp_path / "prefect"),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(BEAT_S),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    operator = Operator(address, environment)
    server = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    with process(operator, tmp_path, "server", *server, url=f"{address}/api/health"):
        yield operator


def until(holds: Callable[[], object], operator: Operator) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, operator.tails()
        time.sleep(0.2)


def automation_of(client: SyncPrefectClient) -> Automation:
    (found,) = client.read_automations_by_name(automations.NAME)
    return found


@pytest.mark.faults
def test_every_deploy_sets_up_one_automation_that_stays_off_if_it_was_turned_off(
    operator: Operator,
) -> None:
    deploy(f"{operator.address}/api", tracking=None)
    with SyncPrefectClient(f"{operator.address}/api") as client:
        found = automation_of(client)
        assert found.enabled and isinstance(found.trigger, EventTrigger)
        assert found.trigger.within.total_seconds() == automations.SILENCE_S
        client.pause_automation(found.id)
        deploy(f"{operator.address}/api", tracking=None)
        assert automation_of(client).id == found.id and not automation_of(client).enabled


def test_a_killed_flow_run_is_marked_as_crashed_and_the_run_is_resumed(
    operator: Operator, tiny_model: Path, tmp_path: Path
) -> None:
    with temporary_settings({PREFECT_API_URL: f"{operator.address}/api"}):
        automations.mark_dead_flow_runs(SILENCE_S)
    (tmp_path / "held.py").write_text(HELD_REWARD)
    config = tiny_config(
        tiny_model,
        reward={"name": "held:score"},
        storage={"root": str(tmp_path / "store")},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        outputs=str(tmp_path / "outputs"),
    )
    file, log = tmp_path / "config.yaml", tmp_path / "train.log"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    operator.logs["train"] = log

    with ExitStack() as started, SyncPrefectClient(f"{operator.address}/api") as client:

        def train(epochs: int) -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-c", TRAIN, str(file), str(epochs)],
                    env=operator.environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            started.callback(kill, process)
            return process

        def states() -> list[str | None]:
            """The state of each start of the run, in order."""
            found = [run for run in client.read_flow_runs() if run.name == "night"]
            return [run.state_name for run in sorted(found, key=lambda run: str(run.created))]

        assert train(1).wait(LIMIT_S) == 0, operator.tails()
        (tmp_path / "hold").touch()
        killed = train(2)
        until((tmp_path / "held").exists, operator)
        kill(killed)
        assert states() == ["Completed", "Running"]
        until(lambda: states()[1] == "Crashed", operator)
        # Longer ago, the first one fell silent too, but it had ended.
        assert states() == ["Completed", "Crashed"]
        (tmp_path / "hold").unlink()
        assert train(2).wait(LIMIT_S) == 0, operator.tails()
        assert states() == ["Completed", "Crashed", "Completed"]
