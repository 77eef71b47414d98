"""Object stores that tests start for themselves, on loopback ports that are free."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.prefect_homes import prefect_home

BUCKET = "ddpo"
START_LIMIT_S = 300.0
GRPC_OFFSET = 10_000
"""SeaweedFS opens each port a second time, this much higher."""


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server.

    Attributes:
        endpoint_url: Where it listens.
        access_key: Of the account that owns the bucket.
        secret_key: Likewise.
        pid: Of its process.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    pid: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """The usual AWS variables that point to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def free_port(offset: int = 0) -> int:
    """Return a loopback port that is free, as is the one `offset` above it."""
    while True:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port + offset > 65_535:
                continue
            try:
                if offset:
                    high.bind(("127.0.0.1", port + offset))
            except OSError:
                continue
            return port


def wait_for_put(store: ObjectStore, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a put succeeds: an open port says nothing about the volumes behind it.

    Args:
        store: The server; its bucket is created where it is not there.
        process: Ends the wait if it ends.
        log: What the process printed, shown if it does not come up.
    """
    client = boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if BUCKET not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="up", Body=b"")
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            client.delete_object(Bucket=BUCKET, Key="up")
            return
    raise RuntimeError(f"the object store did not come up: {log.read_text()[-2000:]}")


@contextmanager
def running(command: list[str], store: ObjectStore, folder: Path) -> Iterator[ObjectStore]:
    """Run a server until the block ends.

    Args:
        command: Starts it.
        store: What it will be.
        folder: Gets its log.
    """
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env=os.environ | store.environment
        )
    try:
        wait_for_put(store, process, log)
        yield replace(store, pid=process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def seaweedfs(folder: Path, again: ObjectStore | None = None) -> Iterator[ObjectStore]:
    """Run SeaweedFS.

    Args:
        folder: Holds its data; a second start on the same folder finds what the first one stored.
        again: What the first start on the folder gave: the second has its address and keys.
    """
    ports = _ports_of(folder)
    weed = Path(sys.executable).with_name("weed")
    command = [str(weed), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={number}" for name, number in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
    command += ["-master.telemetry=false", f"-bucket={BUCKET}"]
    fresh = ObjectStore(f"http://127.0.0.1:{ports['s3']}", "tests", f"canary-{uuid.uuid4().hex}")
    with running(command, again or fresh, folder) as up:
        yield up


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run MLflow's server until the block ends, or until its process group is killed.

    Args:
        folder: Holds its database, `mlflow.db`, and its artifacts.
        port: Where it listens.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    log = folder / "mlflow.log"
    # As `ddpo ui` and `make server` run it.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 2 * START_LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def prefect_server(folder: Path, port: int) -> Iterator[None]:
    """Run a Prefect server until the block ends."""
    environment = {**os.environ, "PREFECT_HOME": prefect_home(folder / "server")}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ports_of(folder: Path) -> dict[str, int]:
    """Return the ports of the servers that share a folder: they find each other by them."""
    file = folder / "ports.json"
    if not file.exists():
        names = ("master", "volume", "filer", "s3")
        file.write_text(json.dumps({name: free_port(GRPC_OFFSET) for name in names}))
    return json.loads(file.read_text())


@contextmanager
def moto(folder: Path) -> Iterator[ObjectStore]:
    """Run moto's server, which keeps everything in memory.

    Args:
        folder: Gets its log.
    """
    port = free_port()
    server = Path(sys.executable).with_name("moto_server")
    store = ObjectStore(f"http://127.0.0.1:{port}", "tests", f"canary-{uuid.uuid4().hex}")
    with running([str(server), "-H", "127.0.0.1", "-p", str(port)], store, folder) as up:
        yield up


@contextmanager
def rclone(folder: Path) -> Iterator[ObjectStore]:
    """Run `rclone serve s3`, which lets every writer of an exclusive put win.

    Args:
        folder: Holds its data.
    """
    port = free_port()
    (folder / "data").mkdir()
    store = ObjectStore(f"http://127.0.0.1:{port}", "tests", f"canary-{uuid.uuid4().hex}")
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3"]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", f"tests,{store.secret_key}"]
    command += ["--config", os.devnull, str(folder / "data")]
    with running(command, store, folder) as up:
        yield up
