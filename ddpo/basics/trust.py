"""Which stored runs this machine trusts, and what the others may not name.

A run's record is data, but it names code to import, addresses to call and files to read. On the
machine that started the run, its user chose them. Elsewhere they are refused until someone says
that the run is trusted. Nothing here matters for reading a run, which uses none of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from ddpo.basics.digests import sha256_bytes
from ddpo.errors import NotTrusted

TRUSTED_MODULES = "DDPO_TRUSTED_MODULES"
"""Environment variable with the modules and packages whose code any run may name, separated by
commas."""


@dataclass(frozen=True)
class _StoredRun:
    name: str
    digest: str
    chosen: frozenset[str]


_acting_for: ContextVar[_StoredRun | None] = ContextVar("the run that names things", default=None)
_trusted_here: set[str] = set()
"""What this process trusts, in case the state folder cannot be written."""


def trust(digest: str) -> None:
    """Trust a run's settings from now on, on this machine and as this user.

    Args:
        digest: Their sha256 in hex: `Run.trusted_digest`.
    """
    trust_in_process(digest)
    # Without a state folder, only the commands of other processes will ask again.
    with suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / digest).touch()


def trust_in_process(digest: str) -> None:
    """Trust a run's settings in this process, which works for one that trusts them.

    Args:
        digest: `Run.trusted_digest`.
    """
    _trusted_here.add(digest)


def trust_place(place: str) -> None:
    """Trust an address or a path from now on, whichever run names it."""
    trust(sha256_bytes(place.encode()))


def is_trusted(digest: str) -> bool:
    """Return whether this machine trusts the settings, or the place, that has a digest."""
    if digest in _trusted_here:
        return True
    with suppress(OSError, RuntimeError):
        return (_folder() / digest).exists()
    return False


@contextmanager
def acting_for(name: str, digest: str, chosen: Iterable[str] = ()) -> Iterator[None]:
    """Treat what is named within as named by a stored run, and not by the user.

    Args:
        name: The run, for messages: `run 'R' in ROOT`.
        digest: Its identity's digest.
        chosen: Names of plug-ins that the user chose in place of the run's.
    """
    token = _acting_for.set(_StoredRun(name, digest, frozenset(chosen)))
    try:
        yield
    finally:
        _acting_for.reset(token)


@contextmanager
def building(plugin: str) -> Iterator[None]:
    """Build a plug-in within: if the user chose it, whatever it names is the user's choice too."""
    run = _acting_for.get()
    token = _acting_for.set(None if run and plugin in run.chosen else run)
    try:
        yield
    finally:
        _acting_for.reset(token)


def check_trusted(what: str) -> None:
    """Refuse what a stored run names, unless this machine trusts the run.

    Args:
        what: What the run names, as a clause: `its reward sends images to addresses that it names`.

    Raises:
        NotTrusted: The run is not trusted.
    """
    run = _acting_for.get()
    if run is not None and not is_trusted(run.digest):
        raise NotTrusted(run.name, what)


def check_place(what: str, place: str, path: Path | None) -> None:
    """Refuse an address or a path that a stored run is operated with, unless this machine knows it.

    How a run is operated is no part of its identity, so trusting the run is not enough. What lies
    below the working directory is allowed.

    Args:
        what: What the run does there, as a clause.
        place: The address or path, as the run names it.
        path: The path; None if it is none.

    Raises:
        NotTrusted: Neither a start on this machine nor `Run.trust` has named it before.
    """
    run = _acting_for.get()
    if run is None or is_trusted(sha256_bytes(place.encode())):
        return
    if path is None or not path.resolve().is_relative_to(Path.cwd()):
        raise NotTrusted(run.name, what)


def check_module(what: str, module: str) -> None:
    """Refuse code that a stored run names, unless the run or the code's module is trusted.

    Args:
        what: What the run names: `reward 'my_rewards:f'`.
        module: The module that it is in.

    Raises:
        NotTrusted: Neither is trusted.
    """
    listed = {name.strip() for name in os.environ.get(TRUSTED_MODULES, "").split(",")}
    if not any(name and f"{module}.".startswith(f"{name}.") for name in listed):
        check_trusted(
            f"its {what} is code in the module {module}, which {TRUSTED_MODULES} does not list"
        )


def _folder() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return state / "ddpo" / "trusted"
