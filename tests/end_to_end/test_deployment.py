"""`prefect.yaml`: a Prefect server, a process worker and the CLI, as an operator starts them."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
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
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.flows import load_flow_from_entrypoint

from ddpo.basics.digests import tensors_digest
from ddpo.rewards import load_reward
from ddpo.runs import Run, open_run
from ddpo.store import manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, EPOCH
from ddpo.store.objects import Store
from ddpo.store.tables import decode_advantages
from ddpo_workflow.flows.server.deploy import POOLS, deploy
from ddpo_workflow.tasks.tracking.connection import RUN_ID_TAG, connect
from tests.prefect_homes import prefect_home
from tests.recorded import SAMPLES, record_run
from tests.tiny import tiny_config

REPOSITORY = Path(__file__).parents[2]
START_LIMIT_S = 900.0
RUN_LIMIT_S = 900.0

_COMMAND = re.compile(r"^prefect deployment run (\S+)( .*)", re.MULTILINE)


@dataclass
class Operator:
    """A server that answers, and the environment of whoever works with it."""

    address: str
    environment: dict[str, str]
    logs: dict[str, Path] = field(default_factory=dict)

    def run_to_the_end(self, deployment: str, parameters: dict[str, Any]) -> FlowRun:
        """Start a deployment as the UI's form does; returns the flow run once it has ended."""
        with SyncPrefectClient(f"{self.address}/api") as client:
            found = client.read_deployment_by_name(deployment)
            created = client.create_flow_run_from_deployment(found.id, parameters=parameters)
            deadline = time.monotonic() + RUN_LIMIT_S
            while not (run := client.read_flow_run(created.id)).state.is_final():
                assert time.monotonic() < deadline, f"{run.name} is {run.state}{self.tails()}"
                time.sleep(0.5)
        assert run.state.is_completed(), f"{run.state}{self.tails()}"
        return run

    def tails(self) -> str:
        return "".join(
            f"\n--- {name}\n{log.read_text(errors='replace')[-4000:]}"
            for name, log in self.logs.items()
        )


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """A server and a worker of these tests' own, all of `prefect.yaml` deployed."""
    folder = tmp_path_factory.mktemp("operator")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_LOGGING_")},
        "PREFECT_HOME": prefect_home(folder / "prefect"),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    operator = Operator(address, environment)
    with ExitStack() as stack:
        server = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
        health = f"{address}/api/health"
        stack.enter_context(process(operator, folder, "server", *server, url=health))
        deploy(f"{address}/api", tracking=None)
        for pool in POOLS:
            worker = ("worker", "start", "-p", pool)
            stack.enter_context(process(operator, folder, f"worker of {pool}", *worker))
        yield operator


def deployments() -> dict[str, str]:
    """Entrypoints of `prefect.yaml` by the full names of their deployments."""
    listed = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    entrypoints = {each["name"]: each["entrypoint"] for each in listed}
    return {f"ddpo-{path.partition(':')[2]}/{name}": path for name, path in entrypoints.items()}


def documented() -> list[tuple[str, str]]:
    """Deployments and parameters of all commands that the documentation shows."""
    pages = sorted((REPOSITORY / "docs").glob("*.md"))
    texts = [page.read_text().replace("\\\n", "") for page in pages]
    return [found for text in texts for found in _COMMAND.findall(text)]


def test_every_deployment_is_documented() -> None:
    assert {name for name, _ in documented()} == set(deployments())


@pytest.mark.parametrize(("name", "words"), documented(), ids=itertools.count())
def test_a_documented_command_gives_what_its_flow_takes(name: str, words: str) -> None:
    flow = load_flow_from_entrypoint(str(REPOSITORY / deployments()[name]))
    marks = shlex.split(words, comments=True)
    given = dict(m.split("=", 1) for mark, m in itertools.pairwise(marks) if mark == "--param")
    assert given
    required = {p.name for p in signature(flow.fn).parameters.values() if p.default is p.empty}
    assert required <= given.keys() <= signature(flow.fn).parameters.keys()
    read = {key: yaml.safe_load(value) for key, value in given.items()}  # numbers as JSON has them
    assert flow.validate_parameters(read).items() >= read.items()


@pytest.mark.slow
def test_all_forms_explain_their_fields(operator: Operator) -> None:
    with SyncPrefectClient(f"{operator.address}/api") as client:
        for name in deployments():
            form = client.read_deployment_by_name(name)
            fields = form.parameter_openapi_schema["properties"]
            told = {
                key: (field.get("type"), field.get("description")) for key, field in fields.items()
            }
            assert all(all(each) for each in told.values()), (name, told)
            # Only `train` has a schedule, and that one is for an operator to switch on.
            schedules = [schedule.active for schedule in form.schedules]
            assert schedules == ([False] if name == "ddpo-train/train" else [])


@pytest.mark.slow
def test_a_run_from_the_form_is_whole_and_resume_goes_on_with_it(
    operator: Operator, tiny_model: Path, tmp_path: Path
):
    store, uri = Store.open(str(tmp_path / "store")), f"sqlite:///{tmp_path}/mlflow.db"
    file = tmp_path / "tiny_run.yaml"
    settings = tiny_config(tiny_model, outputs=str(tmp_path / "outputs")).model_dump(mode="json")
    file.write_text(yaml.safe_dump(settings))

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


@dataclass(frozen=True)
class Saved:
    """A run of two epochs that is in a store, and where MLflow is to show what becomes of it."""

    run: Run
    uri: str
    folder: Path

    def rewards(self, reward_id: str, epoch: int) -> list[float | None]:
        """What a reward says of an epoch's samples, by the table of advantages."""
        key = ADVANTAGES.key(Partition(self.run.run_id, epoch, reward_id=reward_id))
        found = manifests.find(self.run.store, key)
        assert found is not None
        table = self.run.store.get(found.manifest.objects["advantages"])
        return [row.reward for row in decode_advantages(table)]

    def weights(self, run_id: str, epoch: int) -> str:
        found = CHECKPOINT.commit_of(self.run.store, Partition(run_id, epoch))
        assert found is not None
        return tensors_digest(CHECKPOINT.load(self.run.store, found.ref).state().weights)


@pytest.fixture(scope="module")
def saved(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    tracking = {"uri": uri, "pictures": {"prompts": ["a cat"], "seeds": [0]}}
    outputs = str(folder / "outputs")
    run = record_run(tiny_model, folder / "store", epochs=2, tracking=tracking, outputs=outputs)
    return Saved(run, uri, folder)


@pytest.mark.slow
def test_rescore_from_the_form_scores_what_is_saved(operator: Operator, saved: Saved) -> None:
    filled = {"run_id": "mine", "reward": "jpeg_incompressibility", "storage": saved.run.store.root}
    operator.run_to_the_end("ddpo-rescore/rescore", {**filled, "parameters": None, "epochs": None})
    own = saved.run.reward.identity.reward_id
    new = load_reward("jpeg_incompressibility", {}).identity.reward_id
    for epoch in range(2):
        expected = [-reward for reward in saved.rewards(own, epoch) if reward is not None]
        assert len(expected) == SAMPLES
        assert saved.rewards(new, epoch) == pytest.approx(expected)
    page = mlflow_run(saved.uri, f"mine-by-{new}")
    assert page.info.status == "FINISHED"
    assert page.data.metrics["agreement/pearson"] == pytest.approx(-1)


@pytest.mark.slow
def test_fork_from_the_form_ends_in_the_weights_of_its_run(
    operator: Operator, saved: Saved
) -> None:
    filled = {"run_id": "mine", "epoch": 1, "storage": saved.run.store.root, "fork_id": "again"}
    operator.run_to_the_end("ddpo-fork/fork", {**filled, "reward": None, "parameters": {}})
    assert saved.weights("again", 2) == saved.weights("mine", 2)
    assert saved.weights("again", 2) != saved.weights("again", 1)
    assert mlflow_run(saved.uri, "again").info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.faults
def test_compare_from_the_form_runs_all_variants(operator: Operator, saved: Saved) -> None:
    base = {**saved.run.config.identity(), **saved.run.config.operation()}
    base["numerics"] = saved.run.config.numerics.model_dump(mode="json")
    variants = {"is": {}, "sf": {"algorithm": {"type": "ddpo_sf"}}}
    file = saved.folder / "tiny_pair.yaml"
    file.write_text(yaml.safe_dump({"base": base, "variants": variants, "seeds": [0], "epochs": 2}))
    filled = {"config_file": str(file), "name": None, "storage": saved.run.store.root}
    ended = operator.run_to_the_end("ddpo-compare/compare", {**filled, "overrides": []})
    assert ended.name == "tiny-pair"
    first = {saved.weights(f"tiny-pair-seed0-{each}", 0) for each in ("shared", *variants)}
    assert len(first) == 1
    assert len({saved.weights(f"tiny-pair-seed0-{each}", 2) for each in variants} | first) == 3
    assert (saved.folder / "outputs" / "tiny-pair" / "comparison.md").is_file()
    assert mlflow_run(saved.uri, "tiny-pair").info.status == "FINISHED"


def mlflow_run(uri: str, run_id: str) -> Any:
    """Find the one page of a run."""
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments, filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'")
    return found


def check_whole(store: Store, uri: str, run_id: str, epochs: int) -> str:
    """Check that store and MLflow have all of a run; returns its id in MLflow."""
    for epoch in range(epochs):
        assert EPOCH.commit_of(store, Partition(run_id, epoch)) is not None
    assert EPOCH.commit_of(store, Partition(run_id, epochs)) is None
    for epoch in range(epochs + 1):
        checkpoint = CHECKPOINT.commit_of(store, Partition(run_id, epoch))
        assert checkpoint is not None
        for stored in checkpoint.manifest.objects.values():
            store.get(stored)  # verifies the digest
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    page = mlflow_run(uri, run_id)
    assert page.info.status == "FINISHED"
    mlflow_run_id = page.info.run_id
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
