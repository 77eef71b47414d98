"""SeaweedFS on this machine: a bucket to try a run in."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel

from ddpo_workflow.flows.server.processes import HOST, Service, free_port, start

BUCKET = "ddpo"
GRPC_OFFSET = 10_000
"""SeaweedFS opens each port a second time, this much higher."""
_INNER = ("master", "volume", "filer", "admin")


class Bucket(BaseModel, frozen=True):
    """What distinguishes the server of a folder, and is kept in it."""

    ports: dict[str, int]
    """Of its inner servers. They stay the same: the servers find each other's data by them."""
    secret_key: str

    def environment(self, port: int) -> dict[str, str]:
        """Return the usual AWS variables that lead to the bucket.

        Args:
            port: Where the server listens.
        """
        return {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
            "AWS_ACCESS_KEY_ID": "ddpo",
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def find_program() -> str | None:
    """Return SeaweedFS's program: beside this Python, or on the PATH."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def bucket_of(folder: Path) -> Bucket:
    """Return what the server of a folder is; made the first time.

    Args:
        folder: Holds its data.
    """
    file = folder / "bucket.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        ports = {name: free_port(GRPC_OFFSET) for name in _INNER}
        file.touch(mode=0o600)
        file.write_text(Bucket(ports=ports, secret_key=secrets.token_hex(20)).model_dump_json())
    return Bucket.model_validate(json.loads(file.read_text()))


def start_bucket(
    program: str,
    folder: Path,
    bucket: Bucket,
    port: int,
    log: Path,
    remember: Callable[[Service], None],
) -> Service:
    """Start SeaweedFS; `answers` says when the bucket can be written.

    Args:
        program: Its program.
        folder: Holds its data.
        bucket: What it is.
        port: Where it listens.
        log: Gets what it prints.
        remember: Called with its process before it runs.
    """
    command = [
        program,
        "-logtostderr=true",
        "mini",
        f"-dir={folder}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
    ]
    ports = bucket.ports | {"s3": port}
    command += [f"-{name}.port={number}" for name, number in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
    command += ["-master.telemetry=false", f"-bucket={BUCKET}"]
    environment = os.environ | bucket.environment(port)
    return start("SeaweedFS", command, log, environment, remember, folder=folder)


def answers(bucket: Bucket, port: int) -> bool:
    """Return whether an object can be written: an open port says nothing of the volumes behind it.

    Args:
        bucket: What the server is.
        port: Where it listens.
    """
    place = bucket.environment(port)
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=place["AWS_ENDPOINT_URL"],
        aws_access_key_id=place["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=place["AWS_SECRET_ACCESS_KEY"],
        region_name=place["AWS_DEFAULT_REGION"],
        config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )
    try:
        client.put_object(Bucket=BUCKET, Key="up", Body=b"")
        client.delete_object(Bucket=BUCKET, Key="up")
    except (BotoCoreError, ClientError):
        return False
    return True
