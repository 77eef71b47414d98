"""A store's address: however it is written, what is written below it is also listed below it."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ddpo.config.s3 import S3Options
from ddpo.errors import StoreNotWritable
from ddpo.store.objects import Store
from ddpo.store.upkeep.probe import probe
from tests.servers import BUCKET, ObjectStore


@pytest.mark.parametrize("server", ["seaweedfs", "moto"])
@pytest.mark.parametrize("form", ["s3://{}//{}", "s3://{}/{}/", "s3a://{}//{}//", "s3://{}///{}"])
def test_repeated_slashes_in_a_bucket_count_as_one(
    server: str, form: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: ObjectStore = request.getfixturevalue(server)
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    prefix, options = uuid.uuid4().hex, S3Options(endpoint_url=running.endpoint_url)
    store = Store.open(form.format(BUCKET, prefix), options)
    probe(store)
    stored = store.put("runs/a", ".bin", b"x")
    plain = Store.open(f"s3://{BUCKET}/{prefix}", options)
    assert store.root == plain.root
    assert store.list() == plain.list() == [stored.key]
    assert plain.get(stored) == b"x"


@pytest.mark.parametrize("form", ["{}//a///b", "/{}/a/b/", "file://{}//a//b"])
def test_repeated_slashes_in_a_path_count_as_one(form: str, tmp_path: Path) -> None:
    store = Store.open(form.format(tmp_path))
    stored = store.put("runs/a", ".bin", b"x")
    assert store.root == (tmp_path / "a" / "b").as_uri()
    assert store.list() == [stored.key]


@pytest.mark.parametrize("root", ["s3:///prefix", "s3://", "s3:////prefix"])
def test_an_address_without_a_bucket_is_refused(root: str) -> None:
    with pytest.raises(StoreNotWritable, match="names no bucket"):
        Store.open(root)


@pytest.mark.parametrize("root", ["s3://bucket/../other", "s3://bucket/./a", "memory://a/../b"])
def test_dots_that_an_object_store_takes_literally_are_refused(root: str) -> None:
    with pytest.raises(StoreNotWritable, match="segment"):
        Store.open(root)


def test_the_probe_refuses_a_store_whose_listings_miss_what_was_written() -> None:
    class Unlisted(MemoryFileSystem):
        cachable = False

        def ls(self, path: str, detail: bool = True, **_: object) -> list[object]:
            return []

    store = Store(Unlisted(), f"/{uuid.uuid4().hex}")
    with pytest.raises(StoreNotWritable, match="listing of a folder does not show"):
        probe(store)
