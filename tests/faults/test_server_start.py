"""Prefect's temporary server behind a proxy, on another version's database, or on none at all."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.prefect_homes import prefect_home
from tests.zygote import zygote

LIMIT_S = 900

START = """
from ddpo_workflow.flows.cli.quiet import set_defaults
set_defaults()
from ddpo_workflow.flows.cli.temporary_server import start_server
start_server()
start_server()  # as a second command of one process does
from prefect.client.orchestration import get_client
print("problem:", get_client(sync_client=True).api_healthcheck())
"""

BEGIN = """
import time
from ddpo_workflow.flows.cli import temporary_server
temporary_server.start_server()
for server in temporary_server._begun:
    print(server._process.pid, flush=True)
time.sleep(900)
"""

NAMED = """
from ddpo_workflow.flows.cli.temporary_server import start_server
start_server()
from prefect.settings import get_current_settings
print(get_current_settings().api.url)
"""

OPEN = """
import asyncio
from ddpo_workflow.flows.cli.quiet import set_defaults
set_defaults()
from ddpo_workflow.flows.cli.temporary_server_process import open_database
print("ready", flush=True)
input()
asyncio.run(open_database())
print("open", flush=True)
"""


def train(tiny_model: Path, folder: Path, home: Path) -> tuple[int, str]:
    """Train by the command; returns its exit status, and its screen's words in one line."""
    words = ["train", "configs/starter.yaml", "--run-id", "r", "--root", str(folder / "store")]
    for setting in (
        f"model={{path: {tiny_model}}}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"outputs={folder}/outputs",
        "sampler.window=null",
        "epochs=1",
    ):
        words += ["--set", setting]
    environment = {**os.environ, "PREFECT_HOME": str(home), "COLUMNS": "400"}
    log = folder / "screen.log"
    status = zygote().start("ddpo_workflow.flows.cli", words, environment, log).wait(LIMIT_S)
    return status, " ".join(log.read_text().split())


@pytest.mark.slow
def test_the_server_is_reached_without_the_proxy_of_the_environment(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "HTTP_PROXY": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "100",
    }
    done = subprocess.run(
        [sys.executable, "-c", START],
        env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.stdout.strip() == "problem: None", done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_it_ends_with_the_process_that_has_started_it(tmp_path: Path) -> None:
    """Also where that is killed, and can end nothing."""
    environment = {**os.environ, "PREFECT_HOME": prefect_home(tmp_path / "prefect")}
    with subprocess.Popen(
        [sys.executable, "-c", BEGIN], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            server = psutil.Process(int(process.stdout.readline()))
        finally:
            process.kill()
    assert not psutil.wait_procs([server], timeout=60)[1]


def test_a_server_that_prefects_settings_name_is_used(tmp_path: Path) -> None:
    (tmp_path / "profiles.toml").write_text(
        'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n'
    )
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", NAMED],
        env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.stdout.strip() == "http://127.0.0.1:9/api", done.stdout + done.stderr[-2000:]
    assert not (tmp_path / "prefect.db").exists()


@pytest.mark.slow
def test_processes_that_start_at_once_create_one_database(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN],
            env={**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        screens = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert screens == ["open\n"] * 4, screens


@pytest.mark.slow
def test_a_database_of_a_newer_prefect_is_named_and_no_run_is_said_to_be_there(
    tiny_model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "prefect"
    home.mkdir()
    with sqlite3.connect(home / "prefect.db") as database:
        database.execute("create table alembic_version (version_num varchar(32) not null)")
        database.execute("insert into alembic_version values ('fedcba987654')")
    status, screen = train(tiny_model, tmp_path, home)
    assert status == 1, screen
    assert "written by a newer version" in screen and "PREFECT_HOME" in screen, screen
    assert str(home / "prefect.db") in screen and "Traceback" not in screen, screen
    assert "ddpo resume" not in screen, screen
    assert not list((tmp_path / "store").rglob("run.json"))


@pytest.mark.slow
def test_a_database_that_cannot_be_opened_is_named(tiny_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "prefect"
    home.mkdir()
    (home / "prefect.db").write_bytes(b"no database" * 1000)
    status, screen = train(tiny_model, tmp_path, home)
    assert status == 1, screen
    assert "cannot be opened" in screen and str(home / "prefect.db") in screen, screen
