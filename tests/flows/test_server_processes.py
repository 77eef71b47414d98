"""`ddpo server`: what is refused before anything is started, and which database is chosen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.server import postgres, start
from ddpo_workflow.flows.server.deploy import POOLS
from ddpo_workflow.flows.server.processes import Service, end, free_port, taken
from ddpo_workflow.flows.server.processes import start as start_process

REPOSITORY = Path(__file__).parents[2]
STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(600)
"""


def ignore(service: Service) -> None:
    """Remember nothing."""


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that somebody else uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_one_message_and_nothing_is_started(
    listener: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = ["--prefect-port", str(free_port()), "--mlflow-port", str(listener)]
    words += ["--store-port", str(free_port(10_000)), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ddpo", "server", "start", *words])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert f"in use on this machine: port {listener} (--mlflow-port). Nothing" in shown
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "logs").exists()


def test_a_server_is_started_from_a_checkout_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ddpo", "server", "start"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "no prefect.yaml" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_stopping_where_nothing_runs_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "none"
    monkeypatch.setattr(sys, "argv", ["ddpo", "server", "stop", "--folder", str(folder)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "nothing was running" in capsys.readouterr().out
    assert not folder.exists()


def test_an_end_takes_what_a_process_has_started_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    service = start_process("it", [sys.executable, "-c", STUBBORN], log, os.environ, ignore)
    while not log.read_text():
        time.sleep(0.05)
    child = psutil.Process(int(log.read_text()))
    end(service)
    assert service.process() is None and not child.is_running()


def test_no_program_runs_that_the_folder_does_not_remember(tmp_path: Path) -> None:
    """A start that is killed at the last moment before it has written down what it starts."""
    log, ran = tmp_path / "log", tmp_path / "ran"
    killed = (
        "import os, signal; from pathlib import Path\n"
        "from ddpo_workflow.flows.server.processes import start\n"
        "def die(service): print(service.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"start('it', ['touch', {str(ran)!r}], Path({str(log)!r}), os.environ, die)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", killed], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(300)
    assert not ran.exists()


def test_a_process_that_has_taken_over_an_id_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    other = start_process("another", sleeper, log, os.environ, ignore)
    remembered = other.model_copy(update={"created_s": other.created_s - 60})
    end(remembered)
    assert remembered.process() is None
    found = other.process()
    assert found is not None
    found.send_signal(signal.SIGKILL)
    found.wait()


def test_a_port_is_free_again_as_soon_as_its_server_has_ended(listener: int) -> None:
    assert taken(listener)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()  # which leaves the server's side in TIME_WAIT
        client.close()
    assert not taken(port)


def test_what_a_folder_remembers_is_read_back(tmp_path: Path) -> None:
    service = Service(name="it", pid=1, created_s=1.5, log=tmp_path / "log")
    folder = start.ServerFolder(tmp_path)
    running = start.Running(services=(service,), shown={"it": "here"}, ready=True)
    folder.write(running)
    assert folder.read() == running
    assert folder.end_all() == 0 and folder.read() == start.Running()


def test_a_database_of_another_version_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    version = tmp_path / "postgres" / "data" / "PG_VERSION"
    version.parent.mkdir(parents=True)
    version.write_text("9\n")
    with pytest.raises(start.ServerError, match="cannot be opened"):
        start._choose_database(tmp_path / "postgres", tmp_path / "prefect.db")


def test_sqlite_stays_the_database_that_it_was_started_with(tmp_path: Path) -> None:
    (tmp_path / "prefect.db").touch()
    chosen = start._choose_database(tmp_path / "postgres", tmp_path / "prefect.db")
    assert isinstance(chosen, str) and "first started" in chosen


def test_without_postgresql_sqlite_is_used_and_the_reason_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "_DEBIAN", tmp_path)
    chosen = start._choose_database(tmp_path / "postgres", tmp_path / "prefect.db")
    assert chosen == "PostgreSQL is not installed"


def test_every_deployment_is_in_a_pool_that_the_server_makes() -> None:
    listed = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    pools = {each["name"]: each["work_pool"]["name"] for each in listed}
    assert set(pools.values()) == set(POOLS)
    assert [name for name, pool in pools.items() if pool == "ddpo-cpu"] == ["rescore"]
    for each in listed:
        hidden = each["work_pool"]["job_variables"]["env"].get("CUDA_VISIBLE_DEVICES")
        assert hidden == ("" if pools[each["name"]] == "ddpo-cpu" else None)


def test_make_starts_and_stops_the_server() -> None:
    for target, command in (("server", "start"), ("server-stop", "stop")):
        done = subprocess.run(
            ["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        assert f"/ddpo server {command}" in done.stdout
