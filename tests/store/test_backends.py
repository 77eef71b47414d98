"""Exclusive puts on S3, where servers and networks behave in their various ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError

from ddpo.config.s3 import S3Options
from ddpo.errors import StoreCallFailed, StoreNotWritable
from ddpo.store import backends
from ddpo.store.objects import Store
from ddpo.store.upkeep.probe import probe
from tests.servers import BUCKET, ObjectStore, rclone


@pytest.fixture
def s3_store(moto: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(backends, "CONFLICT_WAITS_S", (0.0, 0.0, None))
    store = Store.open(f"s3://{BUCKET}/backends", S3Options(endpoint_url=moto.endpoint_url))
    for key in store.list():
        store.delete(key)
    return store


def answer(status: int, code: str) -> OSError:
    """What s3fs makes of a server's refusal."""
    response: Any = {
        "Error": {"Code": code, "Message": code},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error = OSError(5, code)
    error.__cause__ = ClientError(response, "PutObject")
    return error


def around(
    store: Store, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[Callable[[], Any]], Any]
) -> list[int]:
    """Makes the first puts go through `steps`, each of which is given the real put."""
    real, calls = store._fs.pipe_file, [0]

    def put(*arguments, **named):
        calls[0] += 1
        do = lambda: real(*arguments, **named)  # noqa: E731
        return steps[calls[0] - 1](do) if calls[0] <= len(steps) else do()

    monkeypatch.setattr(store._fs, "pipe_file", put)
    return calls


def fail_with(error: Exception) -> Callable[[Callable[[], Any]], Any]:
    def step(put: Callable[[], Any]) -> Any:
        raise error

    return step


def do_then(error: Exception) -> Callable[[Callable[[], Any]], Any]:
    def step(put: Callable[[], Any]) -> Any:
        put()
        raise error

    return step


LOST = ReadTimeoutError(endpoint_url="http://somewhere")


@pytest.mark.parametrize(
    "error", [LOST, answer(412, "PreconditionFailed"), FileExistsError("there already")]
)
def test_a_put_whose_answer_was_lost_has_won(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    around(s3_store, monkeypatch, do_then(error))
    assert s3_store.put_if_absent("a", b"ours")
    assert s3_store.read("a") == b"ours"


@pytest.mark.parametrize("same", [b"ours", b"theirs"])
def test_another_writers_object_is_theirs_even_with_our_bytes(s3_store: Store, same: bytes) -> None:
    assert s3_store.put_if_absent("a", same)
    assert not s3_store.put_if_absent("a", b"ours")
    assert s3_store.read("a") == same


def test_a_server_that_is_busy_with_the_key_is_asked_again(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = answer(409, "ConditionalRequestConflict")
    calls = around(s3_store, monkeypatch, fail_with(busy), fail_with(answer(503, "SlowDown")))
    assert s3_store.put_if_absent("a", b"ours")
    assert calls == [3]


def test_a_server_that_stays_busy_is_an_error_in_the_end(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = answer(409, "ConditionalRequestConflict")
    calls = around(s3_store, monkeypatch, *[fail_with(busy)] * 9)
    with pytest.raises(StoreCallFailed, match=r"could not create a .*ConditionalRequestConflict"):
        s3_store.put_if_absent("a", b"ours")
    assert calls == [3]
    assert not s3_store.exists("a")


def test_the_error_of_the_put_is_told_where_the_look_fails_too(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = PermissionError("not authorized to perform s3:PutObject")
    around(s3_store, monkeypatch, fail_with(refused))
    monkeypatch.setattr(s3_store._fs, "metadata", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(
        s3_store._backend, "_writer", lambda path: (_ for _ in ()).throw(PermissionError("head"))
    )
    with pytest.raises(
        StoreCallFailed, match="PermissionError: not authorized to perform s3:PutObject"
    ):
        s3_store.put_if_absent("a", b"ours")


def test_a_server_that_lets_every_writer_win_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rclone(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = Store.open(f"s3://{BUCKET}/backends")
        with pytest.raises(StoreNotWritable, match=r"s3://ddpo/backends .*let a second writer"):
            probe(store)
        assert store.list() == [] and not any(store.ages())
