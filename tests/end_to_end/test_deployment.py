"""`prefect.yaml`: a Prefect server, a process worker and the CLI, as an operator starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from ddpo.run import open_run
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import find_checkpoint
from ddpo.store.objects import Store
from tasks.mlflow_connection import RUN_ID_TAG, connect
from tests.tiny import tiny_config

REPOSITORY = Path(__file__).parents[2]
START_LIMIT_S = 120.0
COMMAND_LIMIT_S = 120.0
RUN_LIMIT_S = 240.0


@dataclass
class Operator:
    """A server that answers, and the environment of whoever works with it."""

    address: str
    environment: dict[str, str]
    logs: dict[str, Path] = field(default_factory=dict)

    def prefect(self, *words: str) -> str:
        """Run a `prefect` command in the checkout, with nobody at the keyboard."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *words],
            cwd=REPOSITORY,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run_to_the_end(self, deployment: str, parameters: dict[str, Any]) -> FlowRun:
        """Start a deployment as the UI's form does; returns the flow run once it has ended."""
        with SyncPrefectClient(f"{self.address}/api") as client:
            found = client.read_deployment_by_name(deployment)
            created = client.create_flow_run_from_deployment(found.id, parameters=parameters)
            deadline = time.monotonic() + RUN_LIMIT_S
            while not (run := client.read_flow_run(created.id)).state.is_final():
                assert time.monotonic() < deadline, f"{run.name} is {run.state} for too long"
                time.sleep(0.5)
        assert run.state.is_completed(), run.state
        return run

    def tails(self) -> str:
        return "".join(
            f"\n--- {name}\n{log.read_text(errors='replace')[-4000:]}"
            for name, log in self.logs.items()
        )


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    """A server and a worker of this test's own; a failure shows the end of their logs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_LOGGING_")},
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    operator = Operator(address, environment)
    with ExitStack() as stack:
        server = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
        health = f"{address}/api/health"
        stack.enter_context(process(operator, tmp_path, "server", *server, url=health))
        operator.prefect("work-pool", "create", "ddpo", "--type", "process")
        stack.enter_context(process(operator, tmp_path, "worker", "worker", "start", "-p", "ddpo"))
        try:
            yield operator
        finally:
            print(operator.tails())


@pytest.mark.slow
def test_a_run_from_the_form_is_whole_and_resume_goes_on_with_it(
    operator: Operator, tiny_model: Path, tmp_path: Path
):
    store, uri = Store.open(str(tmp_path / "store")), f"sqlite:///{tmp_path}/mlflow.db"
    file = tmp_path / "tiny_run.yaml"
    settings = tiny_config(tiny_model, outputs=str(tmp_path / "outputs")).model_dump(mode="json")
    file.write_text(yaml.safe_dump(settings))

    deployed = operator.prefect("deploy", "--all")
    assert "ddpo-train/train" in deployed
    assert "ddpo-resume/resume" in deployed
    with SyncPrefectClient(f"{operator.address}/api") as client:
        form = client.read_deployment_by_name("ddpo-train/train")
    fields = form.parameter_openapi_schema["properties"].values()
    assert all(field.get("description") and field.get("type") for field in fields)
    assert [schedule.active for schedule in form.schedules] == [False]

    # As the form sends it: what is left empty is null, or not there at all.
    filled = {
        "config_file": str(file),
        "epochs": 2,
        "seed": None,
        "storage": store.root,
        "tracking": uri,
        "overrides": ["sampler.steps=2"],
    }
    ended = operator.run_to_the_end("ddpo-train/train", filled)
    run_id = ended.name
    assert run_id == f"tiny-run-{str(ended.id)[:8]}"
    assert open_run(store, run_id).config.sampler.steps == 2
    whole = check_whole(store, uri, run_id, epochs=2)

    more = {"run_id": run_id, "storage": store.root, "epochs": 3}
    operator.run_to_the_end("ddpo-resume/resume", more)
    assert check_whole(store, uri, run_id, epochs=3) == whole


def check_whole(store: Store, uri: str, run_id: str, epochs: int) -> str:
    """Check that store and MLflow have all of a run; returns its id in MLflow."""
    for epoch in range(epochs):
        assert manifests.find(store, keys.epoch_manifest_key(run_id, epoch)) is not None
    assert manifests.find(store, keys.epoch_manifest_key(run_id, epochs)) is None
    for epoch in range(epochs + 1):
        checkpoint = find_checkpoint(store, run_id, epoch)
        assert checkpoint is not None
        for stored in checkpoint.manifest.objects.values():
            store.get(stored)  # verifies the digest
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'")
    assert [run.info.status for run in found] == ["FINISHED"]
    mlflow_run_id = found[0].info.run_id
    for name in ("reward/mean", "update/loss"):
        history = client.get_metric_history(mlflow_run_id, name)
        assert [metric.step for metric in history] == list(range(epochs))
    adapters = client.search_logged_models(
        experiments, filter_string=f"source_run_id = '{mlflow_run_id}'"
    )
    assert adapters
    return mlflow_run_id


@contextmanager
def process(
    operator: Operator, folder: Path, name: str, *words: str, url: str | None = None
) -> Iterator[None]:
    """Run a `prefect` command beside the test, once `url` answers; ends it and its children."""
    log = operator.logs[name] = folder / f"{name}.log"
    with log.open("w") as stream:
        started = subprocess.Popen(
            [sys.executable, "-m", "prefect", *words],
            cwd=REPOSITORY,
            env=operator.environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while url is not None and not answers(url):
            assert started.poll() is None, f"{name} ended{operator.tails()}"
            assert time.monotonic() < deadline, f"{name} does not answer{operator.tails()}"
            time.sleep(0.3)
        yield
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(started.pid, sign)
                started.wait(15)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
