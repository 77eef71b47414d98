"""A run's lease: a second start is refused while the owner lives, and not once it is dead."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpo.errors import RunBeingTrained, StoreUnavailable
from ddpo.runs import lease
from ddpo.runs.lease import LeaseRecord, held_lease, wait_until_free
from ddpo.store import keys
from ddpo.store.objects import Store
from tests.store.conftest import opened

KEY = keys.lease_key("R")
LIMIT_S = 600.0

OWNER = """
import sys, time
from ddpo.runs import lease
from ddpo.store.objects import Store

lease.BEAT_S = float(sys.argv[2])
with lease.held_lease(Store.open(sys.argv[1]), "R"):
    print("held", flush=True)
    time.sleep(600)
"""

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture(params=["local", "seaweedfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with opened(request.param, request, tmp_path) as found:
        for name, value in (found.s3.environment() if found.s3 else {}).items():
            request.getfixturevalue("monkeypatch").setenv(name, value)
        yield found


@pytest.fixture
def seen_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process looks at the lease from another machine than the one that it runs on."""
    monkeypatch.setattr(lease, "_machine", lambda: "elsewhere")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The looks of this process at a lease that is not its own, one a second, without the wait."""
    made: list[float] = []
    clock = [0.0]

    def passes(seconds: float) -> None:
        made.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(lease.time, "sleep", passes)
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
    return made


def owner_of(store: Store, spawn: Spawn, beat_s: float) -> subprocess.Popen[str]:
    """Start a process that holds the lease; return once it does."""
    process = spawn(OWNER, store.root, beat_s)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def foreign(store: Store, **changes: object) -> LeaseRecord:
    """Leave the lease of a process on another machine."""
    record = lease._new_record().model_copy(
        update={"token": "foreign", "host": "node-7", "machine": "another", **changes}
    )
    store.replace(KEY, record.to_bytes())
    return record


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def stored(store: Store) -> LeaseRecord:
    return LeaseRecord.from_bytes(KEY, store.read(KEY))


# While the owner lives


@pytest.mark.slow
def test_a_run_in_training_is_refused_with_process_host_and_time(
    store: Store, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    owner = owner_of(store, spawn, beat_s=0.2)
    host = os.uname().nodename
    with pytest.raises(RunBeingTrained, match=rf"'R' .* by process {owner.pid} on {host}, since 2"):
        wait_until_free(store, "R")
    with pytest.raises(RunBeingTrained), held_lease(store, "R"):
        raise AssertionError("two hold it")
    assert stored(store).process == owner.pid


@pytest.mark.slow
def test_a_run_in_training_elsewhere_is_refused_too(
    local_store: Store, spawn: Spawn, monkeypatch: pytest.MonkeyPatch, seen_from_elsewhere: None
) -> None:
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    owner = owner_of(local_store, spawn, beat_s=0.2)
    with pytest.raises(RunBeingTrained, match=f"process {owner.pid}"):
        wait_until_free(local_store, "R")


def test_one_process_trains_a_run_once(local_store: Store, looks: list[float]) -> None:
    with held_lease(local_store, "R"):
        with held_lease(local_store, "S"):
            pass  # but it may train several
        with pytest.raises(RunBeingTrained, match=f"process {os.getpid()}"):
            wait_until_free(local_store, "R")
    assert looks == []
    with held_lease(local_store, "R"):
        pass


def test_one_of_many_that_begin_at_once_holds_it(store: Store) -> None:
    ready, done = threading.Barrier(8), threading.Barrier(8)

    def take(_: int) -> bool:
        ready.wait(LIMIT_S)
        try:
            with held_lease(store, "R"):
                done.wait(LIMIT_S)
                return True
        except RunBeingTrained:
            done.wait(LIMIT_S)
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1


# Once it is dead


@pytest.mark.slow
def test_a_killed_process_of_this_machine_is_not_waited_for(
    store: Store, spawn: Spawn, looks: list[float]
) -> None:
    owner = owner_of(store, spawn, beat_s=600.0)
    owner.kill()
    until(lambda: lease._has_ended(stored(store)))
    with held_lease(store, "R"):
        assert stored(store).process == os.getpid()
    assert looks == []


def test_another_process_of_the_same_number_is_not_taken_for_the_owner(
    local_store: Store, looks: list[float]
) -> None:
    here = lease._new_record()
    for gone in (
        here,  # this very process held it, but could not release it
        here.model_copy(update={"process": os.getppid(), "process_began": 1.0}),
    ):
        local_store.replace(KEY, gone.to_bytes())
        with held_lease(local_store, "R"):
            assert stored(local_store).token != gone.token
    assert looks == []


def test_a_silent_owner_elsewhere_is_watched_for_a_minute_and_then_replaced(
    store: Store, looks: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    foreign(store, process=4711)
    with held_lease(store, "R"):
        assert stored(store).process == os.getpid()
    assert sum(looks) == lease.SILENCE_S
    (line,) = caplog.messages
    assert "process 4711 on node-7" in line and "60 s" in line
    assert not store.exists(KEY)


def test_what_was_not_watched_does_not_count(
    local_store: Store, looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = foreign(local_store)
    read, clock = local_store.read, lease.time.monotonic

    def slow(key: str) -> bytes:
        if len(looks) == 3:  # after an hour without an answer, before the owner's next renewal
            monkeypatch.setattr(lease.time, "monotonic", lambda: clock() + 3600.0)
        if len(looks) == 10:
            local_store.replace(KEY, record.model_copy(update={"beat": 1}).to_bytes())
        return read(key)

    monkeypatch.setattr(local_store, "read", slow)
    with pytest.raises(RunBeingTrained, match="node-7"):
        wait_until_free(local_store, "R")


@pytest.mark.parametrize("data", [b"", b"\0\1", b'{"schema_version": 99}'])
def test_a_damaged_lease_holds_up_nobody_for_longer(
    local_store: Store, looks: list[float], data: bytes
) -> None:
    local_store.replace(KEY, data)
    with held_lease(local_store, "R"):
        assert stored(local_store).process == os.getpid()
    assert sum(looks) == lease.SILENCE_S


# What the owner does


def test_a_lease_is_renewed_and_released(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    with held_lease(store, "R"):
        until(lambda: stored(store).beat >= 3)
    assert not store.exists(KEY)
    with pytest.raises(ZeroDivisionError), held_lease(store, "R"):
        raise ZeroDivisionError
    assert not store.exists(KEY)
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_an_outage_costs_renewals_and_nothing_else(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    lost: list[str] = []
    away = threading.Event()
    replace = Store.replace

    def fragile(self: Store, key: str, data: bytes) -> None:
        if away.is_set():
            lost.append(key)
            raise StoreUnavailable("write", key, self.root, "away", "wait")
        replace(self, key, data)

    monkeypatch.setattr(Store, "replace", fragile)
    with held_lease(local_store, "R"):
        away.set()
        until(lambda: len(lost) >= 3)
        before = stored(local_store).beat
        away.clear()
        until(lambda: stored(local_store).beat > before)
    with held_lease(local_store, "R"):
        monkeypatch.setattr(Store, "delete", fragile_delete)
    assert local_store.exists(KEY)  # it could not be released, which is no reason to fail


def fragile_delete(self: Store, key: str) -> None:
    raise StoreUnavailable("delete", key, self.root, "away", "wait")


def test_an_owner_that_was_replaced_goes_on_says_so_and_leaves_the_new_lease_alone(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    with caplog.at_level(logging.WARNING), held_lease(local_store, "R"):
        record = foreign(local_store)
        until(lambda: any("also being trained by process" in line for line in caplog.messages))
        until(lambda: not [thread for thread in threading.enumerate() if thread.name == "lease"])
    assert stored(local_store) == record


def test_a_lease_that_an_observer_removed_is_taken_again(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    with held_lease(local_store, "R"):
        local_store.delete(KEY)
        until(lambda: local_store.exists(KEY))
        assert stored(local_store).process == os.getpid()
