"""A store on S3 behind faults: bounded retries, one winner, no other bytes, errors with a name."""

from __future__ import annotations

import re
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from botocore.retries.standard import ExponentialBackoff

from ddpo.basics import outages
from ddpo.basics.digests import sha256_bytes
from ddpo.config import s3
from ddpo.config.s3 import S3Options
from ddpo.errors import StoreCallFailed, StoreRefused, StoreUnavailable
from ddpo.runs import start_run
from ddpo.store import backends, keys, manifests, objects
from ddpo.store import fs_errors as calls
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from ddpo.store.manifests import Manifest
from ddpo.store.objects import Store, StoredObject
from ddpo.store.tables import decode_advantages, decode_rewards, decode_rollouts
from tests.faults.proxy import Fault, Plan, fault_proxy
from tests.fold import as_in_a_new_process, run_epochs
from tests.servers import BUCKET, ObjectStore
from tests.tiny import tiny_config

RUN = "r"
TABLES: dict[str, Callable[[bytes], list[Any]]] = {
    "rollouts": decode_rollouts,
    "rewards": decode_rewards,
    "advantages": decode_advantages,
}
MANIFEST = ROLLOUTS.key(Partition(RUN, 0, 0))
LONGEST_WAITS_S = 1 + 2 + 4 + 8
"""Before the four more tries of one call, by botocore's standard mode; half of it on average."""

StoreBehind = Callable[..., AbstractContextManager[Store]]


@dataclass
class Waits:
    """What botocore wanted to wait before each next try, in seconds."""

    asked: list[float]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Lets nobody wait between tries, and notes what botocore would have waited."""
    found, real = Waits([]), ExponentialBackoff.delay_amount

    def delay(self: ExponentialBackoff, context: Any) -> float:
        found.asked.append(real(self, context))
        return 0.0

    monkeypatch.setattr(ExponentialBackoff, "delay_amount", delay)
    for module, name in ((calls, "BROKEN_OFF_WAITS_S"), (backends, "CONFLICT_WAITS_S")):
        shorter = tuple(wait and 0.01 for wait in getattr(module, name))
        monkeypatch.setattr(module, name, shorter)
    return found


@pytest.fixture
def behind(seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> StoreBehind:
    """Opens stores behind a proxy with a plan; by default a new root on SeaweedFS."""

    @contextmanager
    def opened(
        plan: Plan, root: str | None = None, upstream: ObjectStore = seaweedfs
    ) -> Iterator[Store]:
        for name, value in upstream.environment.items():
            monkeypatch.setenv(name, value)
        # Credentials alone: s3fs keeps a connection for each endpoint that it is told.
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        place = root or f"s3://{BUCKET}/faults/{uuid.uuid4().hex}"
        with fault_proxy(upstream, plan) as proxy:
            yield Store.open(place, S3Options(endpoint_url=proxy.endpoint_url))

    return opened


# A whole run


def storage_of(store: Store) -> dict[str, Any]:
    """The part of a config that says where a store is."""
    reached = {"s3": store.s3.model_dump(mode="json", exclude_none=True)} if store.s3 else {}
    return {"root": store.root, **reached}


def content_of_run(model: Path, store: Store) -> dict[str, bytes]:
    """Run two epochs on a store, and return what is there, by key."""
    config = tiny_config(
        model, sampler={"steps": 2}, optimizer={"learning_rate": 1e-2}, storage=storage_of(store)
    )
    as_in_a_new_process()
    try:
        run_epochs(start_run(config, RUN), 2)
    finally:
        as_in_a_new_process()
    return {key: store.read(key) for key in store.list()}


def without_starts(content: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out how the run was operated: where the store is, is part of it."""
    starts = keys.starts_prefix(RUN)
    return {key: data for key, data in content.items() if not key.startswith(starts)}


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path) -> dict[str, bytes]:
    """The run in memory."""
    return content_of_run(tiny_model, Store.open(f"memory://{uuid.uuid4().hex}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "read_timeout_s"),
    [
        (Fault("lost_reply", every=3), 20),
        (Fault("slow_down", every=3), 20),
        (Fault("reset", every=3), 20),
        (Fault("cut", every=6, methods=("GET",)), 20),
        (Fault("stall", every=40, stall_s=3.0), 1.5),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_run_behind_faults_leaves_the_same_bytes(
    tiny_model: Path,
    undisturbed: dict[str, bytes],
    behind: StoreBehind,
    waits: Waits,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    read_timeout_s: float,
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", read_timeout_s)
    plan = Plan(fault)
    with behind(plan) as store:
        content = content_of_run(tiny_model, store)
    print(f"{dict(plan.planted)} in {dict(plan.requests)}")
    # Each stall takes as long as the limit on reading, so there are fewer of them.
    assert plan.planted[fault.kind] >= (8 if fault.kind == "stall" else 24)
    # A fault costs another try; a second one too where the machine is slow.
    assert len(waits.asked) <= 2 * plan.planted[fault.kind]
    if fault.kind in ("slow_down", "stall"):  # of the others some are met before botocore sees them
        assert len(waits.asked) >= plan.planted[fault.kind]
    assert without_starts(content) == without_starts(undisturbed)
    # A lost reply does not start the run a second time.
    assert content.keys() == undisturbed.keys()
    for table, decode in TABLES.items():
        files = [data for key, data in content.items() if key.startswith(f"{table}/")]
        rows = [row.sample_id for data in files for row in decode(data)]
        assert len(rows) == len(set(rows)) == 2 * 8, table


# Exclusive creates


def committed(store: Store, data: bytes = b"rows") -> manifests.Committed:
    table = store.put("rollouts/x", ".bin", data)
    return manifests.commit(
        store, MANIFEST, kind="rollouts", inputs={"seed": 1}, objects={"table": table}
    )


@pytest.mark.parametrize("lost", [1, 2, 2 * s3.ATTEMPTS])
def test_a_commit_whose_answer_was_lost_is_the_first(
    behind: StoreBehind, waits: Waits, lost: int
) -> None:
    """Even where the answers to all tries are."""
    creates, looks = Plan(Fault("lost_reply", at=range(1, lost + 1), methods=("PUT",))), Plan()
    with behind(looks) as direct:
        table = direct.put("rollouts/x", ".bin", b"rows")
        with behind(creates, direct.root) as store:
            first = Manifest(kind="rollouts", inputs={"seed": 1}, objects={"table": table})
            assert store.put_if_absent(MANIFEST, first.to_bytes())
        made = committed(direct)
        assert made.manifest == first and not made.diverged
        assert creates.planted == {"lost_reply": lost}
        assert manifests.find(direct, MANIFEST, inputs={"seed": 1}) is not None
        assert manifests.load(direct, made.ref) == made.manifest


def test_of_writers_that_race_behind_lost_replies_one_wins(
    behind: StoreBehind, waits: Waits
) -> None:
    plan, writers, rounds = Plan(Fault("lost_reply", every=2, methods=("PUT",))), 6, 3
    start = Barrier(writers)

    def commit(store: Store, writer: int) -> manifests.Committed:
        start.wait()
        return committed(store, f"of writer {writer}".encode())

    for _ in range(rounds):
        with behind(plan) as store, ThreadPoolExecutor(writers) as pool:
            made = list(pool.map(partial(commit, store), range(writers)))
            (first,) = [one for one in made if not one.diverged]
            assert all(one.ref == first.ref for one in made)
            assert manifests.load(store, first.ref) == first.manifest
    assert plan.planted["lost_reply"] >= rounds * writers


def test_a_start_whose_answer_was_lost_is_written_down_once(
    behind: StoreBehind, waits: Waits, tiny_model: Path
) -> None:
    plan = Plan(Fault("lost_reply", every=1, methods=("PUT",)))
    with behind(Plan()) as direct, behind(plan, direct.root) as store:
        for _ in range(2):
            start_run(tiny_config(tiny_model, storage=storage_of(store)), RUN)
        assert len(direct.list(keys.starts_prefix(RUN))) == 2
        assert direct.exists(keys.run_key(RUN))
    assert plan.planted["lost_reply"] > 3 * s3.ATTEMPTS


# Servers that fail for good

CALLS: dict[str, tuple[str, Callable[[Store], Any], int]] = {
    # The word in the message, the call, and to how many calls of S3 it comes.
    "get": ("read", lambda store: store.read(MANIFEST), 1),
    "digest": ("read", lambda store: store.digest(MANIFEST), 1),
    "exists": ("look at", lambda store: store.exists(MANIFEST), 1),
    "replace": ("write", lambda store: store.replace(MANIFEST, b"x"), 1),
    "create": ("create", lambda store: store.put_if_absent(MANIFEST, b"x"), 2),
    "delete": ("delete", lambda store: store.delete(MANIFEST), 1),
    "list": ("list", lambda store: store.list(MANIFEST), 1),
}


def check_error(error: StoreCallFailed, call: str, store: Store, upstream: ObjectStore) -> None:
    assert f"could not {call} {MANIFEST} in {store.root}: " in str(error)
    shown = "".join(traceback.format_exception(error))
    assert upstream.secret_key not in shown
    assert "AWS4" not in shown and "Signature" not in shown and "Credential=" not in shown


@pytest.mark.parametrize("kind", ["slow_down", "reset", "lost_reply"])
def test_a_server_that_fails_for_good_is_an_error_that_names_the_call(
    behind: StoreBehind, seaweedfs: ObjectStore, waits: Waits, kind: Any
) -> None:
    # aiohttp sends what may be sent twice a second time by itself, if the connection breaks.
    sent = s3.ATTEMPTS if kind == "slow_down" else 2 * s3.ATTEMPTS
    plan = Plan(Fault(kind, every=1))
    with behind(plan) as store:
        for name, (call, do, of_s3) in CALLS.items():
            plan.requests.clear()
            waits.asked.clear()
            with pytest.raises(StoreCallFailed) as caught:
                do(store)
            check_error(caught.value, call, store, seaweedfs)
            assert plan.requests.total() == of_s3 * sent, name
            assert len(waits.asked) == of_s3 * (s3.ATTEMPTS - 1), name
            assert sum(waits.asked) <= of_s3 * LONGEST_WAITS_S, name


def test_a_server_that_is_gone_is_an_error_that_names_the_call(
    behind: StoreBehind, seaweedfs: ObjectStore, waits: Waits
) -> None:
    with behind(Plan()) as store:
        assert not store.exists(MANIFEST)
    for name, (call, do, of_s3) in CALLS.items():
        waits.asked.clear()
        with pytest.raises(StoreCallFailed, match="EndpointConnectionError") as caught:
            do(store)
        check_error(caught.value, call, store, seaweedfs)
        assert len(waits.asked) == of_s3 * (s3.ATTEMPTS - 1), name


def test_a_server_that_is_busy_with_puts_alone_is_not_asked_in_rounds_of_rounds(
    behind: StoreBehind, seaweedfs: ObjectStore, waits: Waits
) -> None:
    plan = Plan(Fault("slow_down", every=1, methods=("PUT",)))
    with behind(plan) as store, pytest.raises(StoreCallFailed) as caught:
        store.put_if_absent(MANIFEST, b"x")
    check_error(caught.value, "create", store, seaweedfs)
    assert "reduce your request rate" in str(caught.value)
    assert plan.requests == {"PUT": s3.ATTEMPTS, "HEAD": 1}


def test_a_write_to_a_bucket_that_is_gone_is_an_error_that_names_the_call(
    behind: StoreBehind, moto: ObjectStore, waits: Waits
) -> None:
    """And not nothing found, which is an answer where something is read."""
    with behind(Plan(), "s3://nowhere/x", moto) as store:
        for call in ("create", "replace"):
            said, do, _ = CALLS[call]
            with pytest.raises(StoreCallFailed, match="FileNotFoundError") as caught:
                do(store)
            check_error(caught.value, said, store, moto)


@pytest.mark.slow
@pytest.mark.faults
def test_botocores_own_waits_end_in_bounded_time(behind: StoreBehind) -> None:
    with behind(Plan(Fault("slow_down", every=1))) as store:
        began = time.monotonic()
        with pytest.raises(StoreCallFailed):
            store.read(MANIFEST)
    assert time.monotonic() - began < LONGEST_WAITS_S + 5


# A run's store, which is waited for


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], Any]:
    """What the screen says of outages, of which even the shortest is mentioned."""
    monkeypatch.setattr(outages, "SILENT_S", 0.0)
    monkeypatch.setattr(outages, "_FIRST_WAITS_S", (0.01,) * 8)
    return lambda: [r.getMessage() for r in caplog.records if r.name == outages.__name__]


@pytest.mark.parametrize("name", CALLS)
def test_a_run_waits_for_a_server_and_says_so(
    behind: StoreBehind, waits: Waits, said: Callable[[], list[str]], name: str
) -> None:
    away = Plan(Fault("slow_down", at=range(1, 2 * s3.ATTEMPTS + 2)))
    with behind(Plan()) as direct, behind(away, direct.root) as store:
        direct.replace(MANIFEST, b"x")
        CALLS[name][1](store.patient(60.0))
    assert away.planted.total() > s3.ATTEMPTS
    line, last = said()
    assert f"the store {direct.root} is unavailable (" in line
    assert re.search(r"\); waiting for it until \d\d:\d\d:\d\d$", line)
    assert last == f"the store {direct.root} answers again"


def test_a_call_that_stands_still_is_mentioned_before_it_fails(
    behind: StoreBehind, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_SLOW_AFTER_S", 0.2)
    plan = Plan(Fault("stall", at=(1,), methods=("HEAD",), stall_s=1.0))
    with behind(plan) as store:
        assert not store.patient(60.0).exists(MANIFEST)
    line, last = said()
    assert "is unavailable (no answer for 0.2 s); waiting for it until" in line
    assert last.endswith("answers again")


def test_a_run_does_not_wait_for_ever(
    behind: StoreBehind, waits: Waits, said: Callable[[], list[str]]
) -> None:
    with behind(Plan(Fault("slow_down", every=1))) as store, pytest.raises(StoreUnavailable):
        store.patient(9.0).read(MANIFEST)
    assert len(said()) == 1


@pytest.mark.parametrize("wrong", ["access_key", "secret_key"])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_keys_are_refused_at_the_first_request(
    behind: StoreBehind,
    seaweedfs: ObjectStore,
    waits: Waits,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
    name: str,
) -> None:
    monkeypatch.setattr(objects, "_SLOW_AFTER_S", 60.0)  # the client's start takes its time
    plan = Plan()
    stranger = replace(seaweedfs, **{wrong: "wrong"})
    with behind(plan, upstream=stranger) as store, pytest.raises(StoreRefused):
        CALLS[name][1](store.patient(60.0))
    assert plan.requests.total() <= 2 and not waits.asked and not said()


# Answers that break off, or do not come


def loaded(store: Store, key: str) -> bytes:
    expected = b"all of it" * 1000
    stored = StoredObject(key=key, size=len(expected), sha256=sha256_bytes(expected))
    return store.load(stored).tobytes()


@pytest.mark.parametrize("read", [Store.read, Store.digest, loaded])
@pytest.mark.parametrize("stall_s", [0.0, 3.0], ids=["ends", "stands still"])
def test_bytes_that_break_off_are_read_again(
    behind: StoreBehind,
    waits: Waits,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Store, str], Any],
    stall_s: float,
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1.5)
    plan = Plan(Fault("cut", at=(1, 2), methods=("GET",), stall_s=stall_s))
    with behind(Plan()) as direct:
        direct.replace(MANIFEST, b"all of it" * 1000)
        with behind(plan, direct.root) as store:
            assert read(store, MANIFEST) == read(direct, MANIFEST)
    assert plan.planted == {"cut": 2}
    assert plan.requests["GET"] == 3


@pytest.mark.parametrize("name", ["get", "digest"])
@pytest.mark.parametrize("stall_s", [0.0, 3.0], ids=["ends", "stands still"])
def test_bytes_that_break_off_for_good_are_an_error_that_names_the_call(
    behind: StoreBehind,
    seaweedfs: ObjectStore,
    waits: Waits,
    monkeypatch: pytest.MonkeyPatch,
    stall_s: float,
    name: str,
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1.5)
    plan = Plan(Fault("cut", every=1, methods=("GET",), stall_s=stall_s))
    with behind(Plan()) as direct:
        direct.replace(MANIFEST, b"all of it" * 1000)
        with behind(plan, direct.root) as store, pytest.raises(StoreCallFailed) as caught:
            CALLS[name][1](store)
    check_error(caught.value, "read", store, seaweedfs)
    assert ("Read timeout on" if stall_s else "Not enough data") in str(caught.value)
    assert plan.requests["GET"] == plan.planted["cut"] == len(calls.BROKEN_OFF_WAITS_S)


def check_stall(behind: StoreBehind, stall_s: float, limit_s: float) -> None:
    """Stall the first call of each kind, and expect it to be tried again after its time is up."""
    acts: dict[str, Callable[[Store], Any]] = {
        "PUT": lambda store: store.put_if_absent(MANIFEST, b"x"),
        "HEAD": lambda store: store.exists(MANIFEST),
        "GET": lambda store: store.read(MANIFEST) == b"x",
    }
    with behind(Plan()) as direct:
        for method, act in acts.items():
            plan = Plan(Fault("stall", at=(1,), methods=(method,), stall_s=stall_s))
            with behind(plan, direct.root) as store:
                began = time.monotonic()
                assert act(store), method
                took = time.monotonic() - began
            assert plan.planted == {"stall": 1}
            assert plan.requests[method] == 2
            assert limit_s <= took, method
            assert direct.read(MANIFEST) == b"x"


def test_a_call_that_stalls_is_tried_again(
    behind: StoreBehind, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1)
    check_stall(behind, stall_s=2, limit_s=1)


@pytest.mark.slow
@pytest.mark.faults
def test_a_call_that_stalls_for_half_a_minute_is_tried_again(behind: StoreBehind) -> None:
    check_stall(behind, stall_s=30, limit_s=s3.READ_TIMEOUT_S)


# Large objects


def test_parts_that_were_joined_with_the_answer_lost_are_an_object(
    behind: StoreBehind, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even on a server, such as MinIO, that forgets an upload whose parts it joined."""
    data = bytes(11 * 2**20)
    # The first POST begins the upload, the second joins its parts, the third asks for it again.
    plan = Plan(
        Fault("lost_reply", at=(2,), methods=("POST",)),
        Fault("no_such_upload", at=(3,), methods=("POST",)),
    )
    with behind(plan) as store:
        in_parts = partial(store._fs.pipe_file, chunksize=5 * 2**20)
        monkeypatch.setattr(store._fs, "pipe_file", in_parts)
        stored = store.put("trajectories/x", ".bin", data)
        assert plan.planted == {"lost_reply": 1, "no_such_upload": 1}
        assert store.get(stored) == data
