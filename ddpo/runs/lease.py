"""A run's lease: which process trains it, so that a second start of the run is refused.

The lease saves compute, and nothing else depends on it: a run that two processes train at once ends
with the same bytes. The owner renews it every few seconds. An observer compares what it reads and
never looks at a clock of another machine: a lease that has changed has a living owner, and one that
did not change for a minute of watching has none. That the owner's process is gone from this very
machine is known at once.
"""

from __future__ import annotations

import contextvars
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil

from ddpo.errors import MissingObject, RunBeingTrained, StoreError
from ddpo.store import keys
from ddpo.store.documents import Sealed
from ddpo.store.objects import Store, now

BEAT_S = 10.0
"""Seconds between two renewals."""
SILENCE_S = 60.0
"""An owner that did not renew its lease for so many seconds of watching is taken for dead."""
LOOK_S = 1.0
"""Seconds between two looks at the lease of another process."""

_LAST_BEAT_S = 2.0
_SAME_START_S = 10.0  # the clock may have been set since

_logger = logging.getLogger(__name__)

_held: set[str] = set()
"""The tokens of the leases that this process holds."""


class LeaseRecord(Sealed):
    """Which process trains a run."""

    token: str
    """Random: identifies the holder, one of perhaps several in a process."""
    host: str
    """Name of the machine, for messages."""
    machine: str
    """What sets the machine apart, since its last boot, from all others."""
    process: int
    """Number of the process on that machine."""
    process_began: float
    """When the process began, by that machine's clock: its number may be used again."""
    at: datetime
    """When the lease was taken (UTC)."""
    beat: int = 0
    """How often it was renewed."""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.at:%Y-%m-%d %H:%M:%S} UTC"


@contextmanager
def held_lease(store: Store, run_id: str) -> Iterator[None]:
    """Hold a run's lease within.

    Args:
        store: The store.
        run_id: The run.

    Raises:
        RunBeingTrained: Another process holds it.
    """
    record = _new_record()
    _held.add(record.token)  # first: another thread here may see the lease as soon as it is there
    try:
        _take(store, run_id, record)
        with _renewed(store.patient(0.0), run_id, record):
            yield
    finally:
        _held.discard(record.token)


def wait_until_free(store: Store, run_id: str) -> None:
    """Return once nobody trains a run; wait while it is unknown whether the lease's owner lives.

    Args:
        store: The store.
        run_id: The run.

    Raises:
        RunBeingTrained: The owner is alive.
    """
    key = keys.lease_key(run_id)
    seen = _read(store, key)
    if seen is None:
        return
    owner = _parsed(key, seen)
    silent, looked = 0.0, time.monotonic()
    while not _has_ended(owner) and silent < SILENCE_S:
        if owner is not None and owner.token in _held:
            raise RunBeingTrained(run_id, str(owner))
        if not silent:
            _logger.warning(
                "run %s has the lease of %s: watching for up to %.0f s whether it is still alive",
                run_id,
                owner or "an unknown process",
                SILENCE_S,
            )
        time.sleep(LOOK_S)
        found = _read(store, key)
        if found is None:
            return
        if found != seen:
            raise RunBeingTrained(run_id, str(_parsed(key, found) or "an unknown process"))
        # What was not watched, because the store or this process was away, does not count.
        silent += min(time.monotonic() - looked, 2 * LOOK_S)
        looked = time.monotonic()
    if _read(store, key) == seen:
        store.delete(key)


def _take(store: Store, run_id: str, record: LeaseRecord) -> None:
    key = keys.lease_key(run_id)
    while not store.put_if_absent(key, record.to_bytes()):
        found = _read(store, key)
        if found == record.to_bytes():
            return  # the answer to an earlier try was lost
        wait_until_free(store, run_id)


@contextmanager
def _renewed(store: Store, run_id: str, record: LeaseRecord) -> Iterator[None]:
    """Renew a lease within, and release it at the end, as far as the store can be reached."""
    left = threading.Event()
    thread = threading.Thread(
        # In this context, so that a warning is in the log of the flow run.
        target=contextvars.copy_context().run,
        args=[_renew_until, left, store, run_id, record],
        name="lease",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(_LAST_BEAT_S)  # a renewal after the release would leave a lease behind
        try:
            _release(store, run_id, record)
        except StoreError as error:
            _logger.info("the lease of run %s remains: %s", run_id, error)


def _renew_until(left: threading.Event, store: Store, run_id: str, record: LeaseRecord) -> None:
    """Renew a lease until its context is left, or until another process holds it."""
    key = keys.lease_key(run_id)
    while not left.wait(BEAT_S):
        record = LeaseRecord.model_validate({**dict(record), "beat": record.beat + 1})
        try:
            found = _read(store, key)
            owner = None if found is None else _parsed(key, found)
            if owner is not None and owner.token != record.token:
                _logger.warning(
                    "run %s is also being trained by %s, which took over while this process gave "
                    "no sign of life. Both go on: the result is the same",
                    run_id,
                    owner,
                )
                return
            if found is None:
                store.put_if_absent(key, record.to_bytes())
            else:
                store.replace(key, record.to_bytes())
        except StoreError as error:
            _logger.info("the lease of run %s was not renewed: %s", run_id, error)


def _release(store: Store, run_id: str, record: LeaseRecord) -> None:
    key = keys.lease_key(run_id)
    found = _read(store, key)
    owner = None if found is None else _parsed(key, found)
    if owner is not None and owner.token == record.token:
        store.delete(key)


def _read(store: Store, key: str) -> bytes | None:
    with suppress(MissingObject):
        return store.read(key)
    return None


def _parsed(key: str, data: bytes) -> LeaseRecord | None:
    """Return what a lease says; None if it is damaged or of another release."""
    with suppress(StoreError):
        return LeaseRecord.from_bytes(key, data)
    return None


def _has_ended(owner: LeaseRecord | None) -> bool:
    """Return whether an owner is known to be gone; unknown counts as no."""
    if owner is None or owner.machine != _machine():
        return False
    if owner.process == os.getpid():
        return owner.token not in _held
    try:
        process = psutil.Process(owner.process)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return abs(process.create_time() - owner.process_began) > _SAME_START_S
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _new_record() -> LeaseRecord:
    return LeaseRecord(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        process=os.getpid(),
        process_began=psutil.Process().create_time(),
        at=now(),
    )


def _machine() -> str:
    """Return what sets this machine apart; containers on it number their processes by themselves.

    Where the system does not say when it was booted, that is its network address.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():012x}"
