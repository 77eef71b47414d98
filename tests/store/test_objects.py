from __future__ import annotations

import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pyarrow.dataset as ds
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from ddpo.errors import CorruptObject, InvalidKey, MissingObject, StoreNotWritable
from ddpo.store import tables
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from ddpo.store.objects import Store, StoredObject
from ddpo.store.upkeep.probe import probe
from tests.store.store_samples import filler, is_whole, rollout_rows


def local_path(store: Store, key: str) -> Path:
    return Path(store.url(key).removeprefix("file://"))


def test_an_object_comes_back_as_it_was_put(store: Store) -> None:
    stored = store.put("a/part", ".bin", b"hello")
    assert stored.key == "a/part-2cf24dba5fb0.bin"
    assert (stored.size, stored.sha256[:12]) == (5, "2cf24dba5fb0")
    assert store.get(stored) == b"hello"
    assert store.read(stored.key) == b"hello"
    assert store.list() == store.list("a") == [stored.key]
    assert store.get(store.put("a/empty", ".bin", b"")) == b""


def test_the_folders_of_a_folder_are_named_whatever_lies_below_them(store: Store) -> None:
    assert store.folders("a") == []
    for stem in ("a/two/below/part", "a/one/part", "a/one/other", "a/part", "ab/three/part"):
        store.put(stem, ".bin", b"hello")
    assert store.folders("a") == ["one", "two"]
    assert store.folders("a/two") == ["below"]
    assert store.folders("a/one") == []


def test_objects_of_one_stem_and_other_bytes_live_side_by_side(store: Store) -> None:
    first, second = store.put("a", ".bin", b"1"), store.put("a", ".bin", b"2")
    assert (store.get(first), store.get(second)) == (b"1", b"2")


def test_an_object_that_is_there_is_not_written_again(local_store: Store) -> None:
    stored = local_store.put("a", ".bin", b"hello")
    before = local_path(local_store, stored.key).stat().st_ino
    assert local_store.put("a", ".bin", b"hello") == stored
    assert local_path(local_store, stored.key).stat().st_ino == before


def test_putting_again_repairs_an_object_that_was_cut_off(store: Store) -> None:
    stored = store.put("a", ".bin", b"hello")
    store.delete(stored.key)
    assert store.put_if_absent(stored.key, b"hel")
    store.put("a", ".bin", b"hello")
    assert store.get(stored) == b"hello"


@pytest.mark.parametrize(
    "damage", [b"jello", b"hell", b"", b"hello!"], ids=["flip", "cut", "empty", "longer"]
)
def test_damaged_objects_are_named_with_both_digests(store: Store, damage: bytes) -> None:
    stored = store.put("a", ".bin", b"hello")
    store.delete(stored.key)
    store.put_if_absent(stored.key, damage)
    with pytest.raises(CorruptObject) as caught:
        store.get(stored)
    found = store.put("other", ".bin", damage).sha256
    assert (caught.value.key, caught.value.expected) == (stored.key, stored.sha256)
    assert caught.value.found == found
    assert all(part in str(caught.value) for part in (stored.key, stored.sha256, found))


def test_swapped_objects_are_both_corrupt(local_store: Store) -> None:
    first, second = local_store.put("a", ".bin", b"1"), local_store.put("a", ".bin", b"2")
    paths = [local_path(local_store, stored.key) for stored in (first, second)]
    paths[0].write_bytes(b"2")
    paths[1].write_bytes(b"1")
    for stored, other in ((first, second), (second, first)):
        with pytest.raises(CorruptObject, match=other.sha256):
            local_store.get(stored)


def test_a_deleted_object_is_missing_by_name(store: Store) -> None:
    stored = store.put("a/b", ".bin", b"hello")
    assert store.exists(stored.key)
    store.delete(stored.key)
    store.delete(stored.key)
    assert not store.exists(stored.key)
    with pytest.raises(MissingObject, match=stored.key):
        store.get(stored)


def test_exclusive_create_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("a/b", b"first")
    assert not store.put_if_absent("a/b", b"second")
    assert store.read("a/b") == b"first"


def test_of_sixteen_racing_threads_exactly_one_creates(raced_store: Store) -> None:
    for attempt in range(5):
        barrier = Barrier(16)

        def race(number: int, key: str = f"race/{attempt}", barrier: Barrier = barrier) -> bool:
            barrier.wait()
            return raced_store.put_if_absent(key, filler(10_000, number))

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(race, range(16)))
        assert won.count(True) == 1
        assert raced_store.read(f"race/{attempt}") == filler(10_000, won.index(True))


def test_readers_see_a_replaced_object_whole(store: Store) -> None:
    path = f"{store._path}/a/b"
    store._backend.write(path, filler(300_000, 0))
    done = Event()

    def read() -> int:
        count = 0
        while not done.is_set() or count == 0:
            assert is_whole(store.read("a/b"))
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for number in range(30):
            store._backend.write(path, filler(300_000, number))
        done.set()
        assert all(reader.result() > 0 for reader in readers)


KILLED_WRITE = """
import os, stat, sys
from ddpo.store.objects import Store

def die_half_way(descriptor):
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.truncate(f"/proc/self/fd/{descriptor}", 2)
        os.kill(os.getpid(), 9)

os.fsync = die_half_way
store = Store.open(sys.argv[1])
getattr(store, sys.argv[2])(*sys.argv[3:-1], bytes.fromhex(sys.argv[-1]))
"""


@pytest.mark.parametrize("call", [("put", "STEM", ".parquet"), ("put_if_absent", "KEY")])
def test_a_write_that_is_killed_leaves_nothing_that_anyone_sees(
    local_store: Store, spawn: Callable, call: tuple[str, ...]
) -> None:
    stem = ROLLOUTS.stem("rollouts", Partition("R", 0, 0))
    whole = local_store.put(stem, ".parquet", tables.encode_rollouts(rollout_rows()))
    folder = local_path(local_store, whole.key).parent
    names = {"STEM": stem, "KEY": f"{stem}.parquet"}
    method, *arguments = [names.get(part, part) for part in call]
    process = spawn(KILLED_WRITE, local_store.root, method, *arguments, b"torn".hex())
    assert process.wait(30) == -signal.SIGKILL
    assert len(list(folder.iterdir())) == 2  # the killed process did get to its temporary file
    assert local_store.list() == [whole.key]
    rollouts = ds.dataset(folder.parents[1], format="parquet", partitioning="hive")
    assert rollouts.count_rows() == 4
    assert local_store.put_if_absent(f"{stem}.parquet", b"next")


def test_probe_passes_where_commits_are_possible_and_leaves_nothing(store: Store) -> None:
    probe(store)
    # SeaweedFS lists an emptied folder as itself.
    assert set(store._fs.find(store._path)) <= {store._path}


def test_probe_names_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreNotWritable, match=r"NotADirectoryError.*permissions"):
        probe(Store.open(str(tmp_path / "file" / "store")))


def test_probe_names_a_store_that_overwrites(local_store: Store, monkeypatch) -> None:
    backend = local_store._backend
    monkeypatch.setattr(backend, "create", lambda path, data: backend.write(path, data) or True)
    with pytest.raises(StoreNotWritable, match="second writer"):
        probe(local_store)


def test_other_filesystems_create_by_fsspecs_conditional_put(tmp_path: Path) -> None:
    store = Store(DirFileSystem(path=str(tmp_path), fs=LocalFileSystem(auto_mkdir=True)), "root")
    assert store.put_if_absent("a", b"first")
    assert not store.put_if_absent("a", b"second")
    stored = store.put("b", ".bin", b"hello")
    assert (store.read("a"), store.get(stored)) == (b"first", b"hello")
    assert store.list() == ["a", stored.key]


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.open("here")
    stored = store.put("a", ".bin", b"x")
    monkeypatch.chdir("/")
    assert store.root == (tmp_path / "here").as_uri()
    assert store.url("a/b") == f"{store.root}/a/b"
    assert Store.open(store.root).get(stored) == b"x"


def test_a_store_crosses_processes_as_its_root(store: Store) -> None:
    stored = store.put("a", ".bin", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.root == store.root
    assert copy.get(stored) == b"x"


@pytest.mark.parametrize("key", ["../a", "/a", "a/../../b", ""])
def test_no_key_leaves_the_root(store: Store, key: str) -> None:
    for call in (store.read, store.exists, store.delete, store.url):
        with pytest.raises(InvalidKey):
            call(key)
    with pytest.raises(InvalidKey):
        store.put_if_absent(key, b"")
    with pytest.raises(ValueError):
        StoredObject(key=key, size=0, sha256="0" * 64)
    with pytest.raises(InvalidKey):
        store.put("a", "/../../b", b"")
