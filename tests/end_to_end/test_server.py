"""`ddpo server`: everything that runs need, started by one command and ended by another."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH
from ddpo.store.objects import Store
from ddpo_workflow.flows.server.bucket import find_program
from ddpo_workflow.flows.server.postgres import NotUsable, open_postgres
from ddpo_workflow.flows.server.processes import free_port
from ddpo_workflow.flows.server.start import ServerFolder
from ddpo_workflow.tasks.tracking.connection import RUN_ID_TAG, connect
from tests.tiny import tiny_config

REPOSITORY = Path(__file__).parents[2]
COMMAND_LIMIT_S = 600.0
RUN_LIMIT_S = 900.0

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that PostgreSQL's own user can reach too, which runs it where tests run as root."""
    made = Path(tempfile.mkdtemp(prefix="ddpo-server-"))
    made.chmod(0o755)
    yield made
    ServerFolder(made).end_all()
    shutil.rmtree(made)


def ddpo(*words: str) -> subprocess.CompletedProcess[str]:
    """Call the command in the checkout, as somebody who has no servers of their own."""
    unset = ("AWS_", "PREFECT_", "MLFLOW_")
    return subprocess.run(
        [sys.executable, "-m", "ddpo_workflow.flows.cli", *words],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if not k.startswith(unset)},
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
        check=False,
    )


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    ports = {"--prefect-port": free_port(), "--mlflow-port": free_port()}
    ports["--store-port"] = free_port(10_000)
    options = [word for name, port in ports.items() for word in (name, str(port))]
    return ddpo("server", "start", "--folder", str(folder), *options)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return what was started in a folder, and all that these processes have started."""
    found = [service.process() for service in ServerFolder(folder).read().services]
    running = [process for process in found if process is not None]
    return [*running, *(child for each in running for child in each.children(recursive=True))]


def naming(folder: Path) -> list[psutil.Process]:
    """Return the processes whose command names a folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]


def exported(folder: Path) -> dict[str, str]:
    """Return what a shell gets that reads `client.env`."""
    lines = (folder / "client.env").read_text().splitlines()
    words = [shlex.split(line) for line in lines]
    return dict(assignment.split("=", 1) for _, assignment in words)


def wait(client: SyncPrefectClient, run: FlowRun, state: str, folder: Path) -> FlowRun:
    deadline = time.monotonic() + RUN_LIMIT_S
    log = folder / "logs" / "ddpo-gpu.log"
    while (found := client.read_flow_run(run.id)).state_name != state:
        assert found.state is not None and not found.state.is_final(), log.read_text()[-4000:]
        assert time.monotonic() < deadline, f"{found.state}: {log.read_text()[-4000:]}"
        time.sleep(0.5)
    return found


@pytest.mark.faults  # make test starts all that a run needs below, and runs it by the form
def test_one_command_starts_all_that_a_run_needs_and_another_ends_it(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_program() is None:
        pytest.skip("SeaweedFS is not installed")
    started = start(folder)
    assert started.returncode == 0, started.stdout + started.stderr
    assert "s3://ddpo" in started.stdout

    # Each service answers where the file for shells says.
    place = exported(folder)
    api, mlflow = place["PREFECT_API_URL"], place["MLFLOW_TRACKING_URI"]
    for address in (f"{api}/health", f"{mlflow}/health"):
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert answer.status == 200
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    s3 = botocore.session.get_session().create_client("s3")
    assert [each["Name"] for each in s3.list_buckets()["Buckets"]] == ["ddpo"]
    uses_postgres = (folder / "postgres" / "data").exists()
    assert uses_postgres != (folder / "prefect" / "prefect.db").exists()
    assert ("on PostgreSQL" in started.stdout) == uses_postgres
    try:
        open_postgres(folder / "postgres")
    except NotUsable as error:
        assert not uses_postgres and f"({error})" in started.stdout
    else:
        assert uses_postgres

    # Nobody else's machine reaches any of them.
    sockets = [each for process in processes_of(folder) for each in process.net_connections()]
    listening = {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}

    # A second start changes nothing.
    before = ServerFolder(folder).read()
    again = start(folder)
    assert again.returncode == 0 and "already running" in again.stdout
    assert ServerFolder(folder).read() == before

    with SyncPrefectClient(api) as client:
        pools = {pool.name: pool.concurrency_limit for pool in client.read_work_pools()}
        assert pools == {"ddpo-gpu": 1, "ddpo-cpu": 2}
        listed = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
        expected = {each["name"]: each["work_pool"]["name"] for each in listed}
        deployed = {each.name: each.work_pool_name for each in client.read_deployments()}
        assert deployed == expected

        # A run goes through the worker to the store, and to MLflow without anybody naming it.
        file = tmp_path / "tiny.yaml"
        settings = tiny_config(tiny_model, outputs=str(tmp_path / "outputs")).model_dump(
            mode="json"
        )
        file.write_text(yaml.safe_dump(settings))
        train = client.read_deployment_by_name("ddpo-train/train")
        filled = {"config_file": str(file), "epochs": 1, "storage": "s3://ddpo/store"}
        created = client.create_flow_run_from_deployment(
            train.id, parameters={**filled, "run_id": "whole"}
        )
        wait(client, created, "Completed", folder)
        store = Store.open("s3://ddpo/store")
        assert EPOCH.commit_of(store, Partition("whole", 0)) is not None
        pages = connect(mlflow).search_runs(
            [each.experiment_id for each in connect(mlflow).search_experiments()],
            filter_string=f"tags.`{RUN_ID_TAG}` = 'whole'",
        )
        assert [page.info.status for page in pages] == ["FINISHED"]

        # What stops is all of it, with the process of a run that is under way.
        endless = {**filled, "epochs": 99_999, "run_id": "endless"}
        created = client.create_flow_run_from_deployment(train.id, parameters=endless)
        wait(client, created, "Running", folder)
    running = processes_of(folder)
    assert any("prefect.engine" in " ".join(process.cmdline()) for process in running)
    stopped = ddpo("server", "stop", "--folder", str(folder))
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert [process for process in running if process.is_running()] == []
    assert not (folder / "client.env").exists()


def test_a_person_starts_a_run_by_the_form_and_opens_its_page_in_mlflow(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import expect

    from bench import prefect_walk, screenshots

    if screenshots.find_browser() is None:
        pytest.skip("no Chromium on the PATH")
    started = start(folder)
    assert started.returncode == 0, started.stdout + started.stderr
    place = exported(folder)
    short = [
        "rollouts.samples_per_epoch=16",
        "rollouts.shard_size=8",
        "numerics.sample_batch_size=8",
        "numerics.micro_batch_size=8",
        f"outputs={tmp_path}/outputs",
    ]
    with screenshots.open_browser() as context:
        page = prefect_walk.find_form(context, place["PREFECT_API_URL"][: -len("/api")], "train")
        fields = {"run_id": "mine", "epochs": "2", "storage": str(tmp_path / "store")}
        prefect_walk.fill_in(page, fields, short)
        prefect_walk.submit(page)
        prefect_walk.follow(page)
        for text in ("mine: 2 epochs", "Mean reward: "):
            expect(page.get_by_text(text).first).to_be_visible()
        page.get_by_role("tab", name="Logs").click()
        expect(page.get_by_text("epoch 2 of 2: mean reward").first).to_be_visible()
        page.get_by_role("tab", name="Artifacts").click()
        prefect_walk.open_mlflow(page, "mine")
        assert page.url.startswith(place["MLFLOW_TRACKING_URI"])
        expect(page.get_by_text("Finished: 2 of 2 epochs done").first).to_be_visible()
    store = Store.open(str(tmp_path / "store"))
    assert EPOCH.commit_of(store, Partition("mine", 1)) is not None


def test_a_start_that_fails_leaves_nothing_behind_and_shows_the_log(folder: Path) -> None:
    (folder / "mlflow").mkdir()
    (folder / "mlflow" / "mlflow.db").write_bytes(b"this is not a database, " * 100)
    failed = start(folder)
    assert failed.returncode == 2
    assert "MLflow ended while it started" in failed.stdout
    assert "not a database" in failed.stdout
    assert not (folder / "running.json").exists()
    assert naming(folder) == []


def test_what_a_killed_start_left_is_ended_by_the_next_stop(folder: Path) -> None:
    command = [sys.executable, "-m", "ddpo_workflow.flows.cli", "server", "start"]
    command += ["--folder", str(folder), "--prefect-port", str(free_port())]
    command += ["--mlflow-port", str(free_port()), "--store-port", str(free_port(10_000))]
    starting = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while not any(each.name == "Prefect" for each in ServerFolder(folder).read().services):
        assert starting.poll() is None
        time.sleep(0.05)
    starting.kill()
    starting.wait()
    running = processes_of(folder)
    assert running and not ServerFolder(folder).read().ready
    stopped = ddpo("server", "stop", "--folder", str(folder))
    assert stopped.returncode == 0 and "stopped" in stopped.stdout
    assert [process for process in running if process.is_running()] == []
    assert naming(folder) == []
