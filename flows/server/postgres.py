"""A PostgreSQL of one folder, for Prefect's server, from the programs that are installed."""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ddpo_workflow.flows.server.processes import HOST, Service, as_user, free_port, start

_USER = "ddpo"
_ACCOUNT = "postgres"  # what packages of PostgreSQL create
_DEBIAN = Path("/usr/lib/postgresql")  # which keeps the server's programs off the PATH
_DATA = "data"
_PASSWORD = "password"
_PROGRAMS = ("initdb", "postgres", "pg_isready")


class NotUsable(Exception):
    """PostgreSQL cannot be run here; the message says why."""


@dataclass(frozen=True)
class StartedPostgres:
    """A server that was started.

    Attributes:
        service: Its process.
        address: Of its database, with the password, for SQLAlchemy.
        ready: The command that succeeds once it answers.
    """

    service: Service
    address: str
    ready: tuple[str, ...]

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            ServerError: It did not start.
        """
        self.service.wait(lambda: subprocess.run(self.ready, check=False).returncode == 0)


@dataclass(frozen=True)
class Postgres:
    """A server of one folder.

    Attributes:
        programs: Where `initdb` and `postgres` are.
        folder: Holds its data and its password.
        account: The user that it runs as; None for this process's own.
        version: Its major version.
    """

    programs: Path
    folder: Path
    account: str | None
    version: str

    def start(self, log: Path, remember: Callable[[Service], None]) -> StartedPostgres:
        """Start it.

        Args:
            log: Gets what it prints.
            remember: Called with its process before it runs.
        """
        port = free_port()
        options = {"listen_addresses": HOST, "port": str(port), "unix_socket_directories": ""}
        command = [str(self.programs / "postgres"), "-D", str(self.data)]
        command += [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        service = start(
            "PostgreSQL",
            command,
            log,
            os.environ,
            remember,
            account=self.account,
            folder=self.folder,
            stop_signal=signal.SIGINT,  # "fast": does not wait for clients to leave
        )
        password = (self.folder / _PASSWORD).read_text()
        address = f"postgresql+asyncpg://{_USER}:{password}@{HOST}:{port}/postgres"
        ready = (str(self.programs / "pg_isready"), "-q", "-h", HOST, "-p", str(port))
        return StartedPostgres(service, address, ready)

    @property
    def data(self) -> Path:
        """Return the folder of its data."""
        return self.folder / _DATA

    def create(self) -> None:
        """Create an empty database if there is none.

        Raises:
            NotUsable: It cannot be created.
        """
        if self.data.exists():
            return
        # Under another name until it is whole: half a database would be taken for one.
        half, password = self.folder / "data.new", self.folder / _PASSWORD
        shutil.rmtree(half, ignore_errors=True)
        password.unlink(missing_ok=True)
        password.touch(mode=0o600)
        password.write_text(secrets.token_hex(16))
        if self.account:
            shutil.chown(password, self.account, self.account)
        command = [str(self.programs / "initdb"), "--pgdata", str(half), "--username", _USER]
        command += ["--auth", "scram-sha-256", "--pwfile", str(password)]
        command += ["--encoding", "UTF8", "--locale", "C"]
        _run(command, self.folder, self.account)
        half.rename(self.data)


def open_postgres(folder: Path) -> Postgres:
    """Return a PostgreSQL that can be started, with its database.

    Args:
        folder: Holds the database, which is created if there is none, or else decides the version.

    Raises:
        NotUsable: None is installed, it cannot run as root here, or the database cannot be made.
    """
    file = folder / _DATA / "PG_VERSION"
    wanted = file.read_text().strip() if file.exists() else None
    installed = {version: programs for programs, version in _installed()}
    if not installed:
        raise NotUsable("PostgreSQL is not installed")
    version = wanted or max(installed, key=float)
    if version not in installed:
        raise NotUsable(
            f"the database was written by PostgreSQL {version}, and {', '.join(installed)} is "
            "installed"
        )
    account = _ACCOUNT if os.geteuid() == 0 else None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if account:
        try:
            pwd.getpwnam(account)
        except KeyError:
            raise NotUsable(
                f"PostgreSQL refuses to run as root, and there is no user {account!r}"
            ) from None
        shutil.chown(folder, account, account)
        reached = subprocess.run(
            ["test", "-w", str(folder)], cwd="/", check=False, **as_user(account)
        )
        if reached.returncode:
            raise NotUsable(
                f"PostgreSQL refuses to run as root, and the user {account!r} cannot reach {folder}"
            )
    postgres = Postgres(installed[version], folder, account, version)
    postgres.create()
    return postgres


def _installed() -> Iterator[tuple[Path, str]]:
    """Yield the folder of each PostgreSQL that is installed, and its major version."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    for folder in [*folders, *_DEBIAN.glob("*/bin")]:
        if all(os.access(folder / name, os.X_OK) for name in _PROGRAMS):
            shown = _run([str(folder / "postgres"), "--version"], folder)
            if found := re.search(r"\) (\d+)", shown):
                yield folder, found[1]


def _run(command: list[str], folder: Path, account: str | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, **as_user(account)
    )
    if done.returncode:
        raise NotUsable(f"`{Path(command[0]).name}` failed: {done.stderr.strip()}")
    return done.stdout
