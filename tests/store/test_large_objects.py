"""Objects too large for memory: from file to file, in parts on S3, and with nothing left over."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.exceptions import FSTimeoutError

from ddpo.basics import outages
from ddpo.errors import CorruptObject, MissingObject, StoreCallFailed
from ddpo.store import backends, objects
from ddpo.store.backends import LocalBackend
from ddpo.store.objects import Store
from ddpo.store.tensors import read_tensors, tensors_in, write_tensors
from ddpo.store.upkeep.scratch import ScratchStore
from ddpo.store.upkeep.sweep import sweep
from ddpo.store.upkeep.uploads import abort_uploads
from tests.store.conftest import opened

STEM = "checkpoints/run_id=R/epoch=00001/weights"
DATA = bytes(range(256)) * 2**16  # 16 MiB


def make(file: Path) -> None:
    file.write_bytes(DATA)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(params=["seaweedfs", "moto"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with opened(request.param, request, tmp_path) as found:
        yield found


def test_a_file_is_the_object_that_its_bytes_would_be(store: Store, temporary: Path) -> None:
    stored = store.put(STEM, ".safetensors", make)
    assert store.list() == store.list(hidden=True) == [stored.key]
    assert store.get(stored) == DATA
    assert store.put(STEM, ".safetensors", DATA) == stored
    with store.fetch(stored) as file:
        assert file.read_bytes() == DATA
        assert not list(temporary.iterdir())
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("damage", [DATA[:-1], b"x" + DATA[1:]], ids=["cut", "changed"])
def test_what_is_fetched_is_verified(store: Store, damage: bytes) -> None:
    stored = store.put(STEM, ".safetensors", make)
    store.replace(stored.key, damage)
    with pytest.raises(CorruptObject, match="expected sha256"), store.fetch(stored):
        raise AssertionError("nobody reads it")
    with pytest.raises(CorruptObject, match="expected sha256"):
        store.load(stored)
    store.delete(stored.key)
    with pytest.raises(MissingObject), store.fetch(stored):
        raise AssertionError("nobody reads it")
    with pytest.raises(MissingObject):
        store.load(stored)


def test_what_is_loaded_belongs_to_its_reader(store: Store, temporary: Path) -> None:
    stored = store.put(STEM, ".safetensors", make)
    loaded = store.load(stored)
    assert loaded.tobytes() == DATA and not list(temporary.iterdir())
    loaded[:] = 0
    assert store.get(stored) == DATA
    assert store.load(store.put(STEM, ".bin", b"")).size == 0


def test_what_is_mapped_outlives_file_and_object(local_store: Store, temporary: Path) -> None:
    tensors = {"a": torch.arange(1_000_000), "b": torch.ones(3)}
    stored = local_store.put(STEM, ".safetensors", lambda file: write_tensors(tensors, file))
    with local_store.fetch(stored) as file:
        found, _ = read_tensors(file)
    # Cut in place, which would end a process that had mapped the object itself.
    local_store.replace(stored.key, b"")
    os.truncate(local_root(local_store) / stored.key, 0)
    assert torch.equal(found["a"], tensors["a"])
    found["a"][0] = 5  # a private page: no error, and no file changes


@pytest.mark.parametrize("left", [DATA[: 2**20], b"x" * len(DATA)], ids=["cut", "overwritten"])
def test_what_changes_in_place_while_it_is_loaded_is_an_error(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, left: bytes
) -> None:
    stored = local_store.put(STEM, ".safetensors", make)
    monkeypatch.setattr(objects, "BLOCK_BYTES", 4 * 2**20)
    tries: list[int] = []

    def change_after_the_first(read: Callable[[], int]) -> int:
        tries.append(count := read())
        (local_root(local_store) / stored.key).write_bytes(left)
        return count

    monkeypatch.setattr(objects, "read_on", change_after_the_first)
    with pytest.raises(CorruptObject):
        local_store.load(stored)
    assert tries[0] == 4 * 2**20 and len(tries) > 1


def test_tensors_that_were_loaded_outlive_the_object(local_store: Store) -> None:
    tensors = {"a": torch.arange(1_000_000), "b": torch.ones(3)}
    stored = local_store.put(STEM, ".safetensors", lambda file: write_tensors(tensors, file))
    found = tensors_in(local_store.load(stored))
    os.truncate(local_root(local_store) / stored.key, 0)
    assert torch.equal(found["a"], tensors["a"]) and torch.equal(found["b"], tensors["b"])


def test_loading_begins_anew_after_an_outage(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = local_store.put(STEM, ".safetensors", make)
    monkeypatch.setattr(objects, "BLOCK_BYTES", 4 * 2**20)
    monkeypatch.setattr(outages, "_FIRST_WAITS_S", (0.0,))
    reads: list[int] = []

    def lost_once(read: Callable[[], int]) -> int:
        reads.append(read())
        if len(reads) == 2:
            raise FSTimeoutError
        return reads[-1]

    monkeypatch.setattr(objects, "read_on", lost_once)
    assert local_store.patient(60.0).load(stored).tobytes() == DATA
    assert len(reads) == 2 + 4


def test_a_store_that_keeps_its_writes_loads_them_too(local_store: Store) -> None:
    below, hidden = (local_store.put(STEM, suffix, make) for suffix in (".bin", ".safetensors"))
    scratch = ScratchStore(local_store, [hidden.key])
    kept = scratch.put(STEM, ".json", b"kept")
    assert not local_store.exists(kept.key)
    assert scratch.load(kept).tobytes() == b"kept" and scratch.load(below).tobytes() == DATA
    with pytest.raises(MissingObject):
        scratch.load(hidden)


def local_root(store: Store) -> Path:
    return Path(store.root.removeprefix("file://"))


def test_others_may_read_a_file_as_they_may_any_object(local_store: Store) -> None:
    tensors = {"a": torch.ones(3)}
    stored = local_store.put(STEM, ".safetensors", lambda file: write_tensors(tensors, file))
    plain = local_store.put(STEM, ".json", b"{}")
    root = local_root(local_store)
    assert (root / stored.key).stat().st_mode == (root / plain.key).stat().st_mode


def test_a_disk_that_fails_while_the_digest_is_computed_is_named(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fails_for_files(descriptor: int) -> None:
        if backends.TEMPORARY_PREFIX in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(backends.os, "fsync", fails_for_files)
    # It fails once: the error is not reported again when the file is renamed.
    monkeypatch.setattr(LocalBackend, "write_file", lambda _, path, file: file.replace(path))
    with pytest.raises(StoreCallFailed, match=f"could not write {STEM}.*Input/output error"):
        local_store.put(STEM, ".safetensors", make)
    assert local_store.list(hidden=True) == []


# In parts


def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "UPLOAD_PART_BYTES", 5 * 2**20)  # the least that S3 allows


def test_a_large_file_goes_to_a_bucket_in_parts(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_parts(monkeypatch)
    stored = bucket.put(STEM, ".safetensors", make)
    assert bucket._info(stored.key)["ETag"].strip('"').endswith("-4")
    assert bucket.get(stored) == DATA
    assert uploads(bucket) == []


def test_a_failed_upload_is_aborted(
    bucket: Store, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_parts(monkeypatch)
    real = bucket._fs._call_s3  # type: ignore[attr-defined]

    async def call(method: str, *words: Any, **named: Any) -> Any:
        if method == "upload_part" and named["PartNumber"] == 3:
            raise OSError(errno.EIO, "the third part is lost")
        return await real(method, *words, **named)

    monkeypatch.setattr(bucket._fs, "_call_s3", call)
    with pytest.raises(StoreCallFailed, match="third part is lost"):
        bucket.put(STEM, ".safetensors", make)
    monkeypatch.undo()
    assert bucket.list(hidden=True) == [] and uploads(bucket) == []
    assert not list(temporary.iterdir())


def uploads(store: Store, run_id: str = "R") -> list[str]:
    """Return the run's unfinished uploads, however young."""
    return abort_uploads(store, run_id, grace=timedelta(days=-1), dry_run=True)


def begin_upload(store: Store, key: str) -> None:
    bucket, path, _ = store._fs.split_path(store._full(key))  # type: ignore[attr-defined]
    store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=path)  # type: ignore[attr-defined]


@pytest.mark.parametrize("bucket", ["seaweedfs"], indirect=True)  # moto invents the time
def test_old_unfinished_uploads_of_the_run_are_aborted(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {run: f"checkpoints/run_id={run}/epoch=00001/weights.bin" for run in ("R", "S")}
    for key in keys.values():
        begin_upload(bucket, key)
    day = timedelta(days=1)
    assert abort_uploads(bucket, "R", grace=day) == []
    monkeypatch.setattr(objects, "now", lambda: datetime.now(UTC) + 2 * day)
    assert abort_uploads(bucket, "R", grace=day, dry_run=True) == [keys["R"]]
    assert abort_uploads(bucket, "R", grace=day) == [keys["R"]]
    assert abort_uploads(bucket, "R", grace=day) == []
    assert uploads(bucket, "S") == [keys["S"]]


UPLOAD = """
import asyncio, sys, tempfile
from ddpo.config.s3 import S3Options
from ddpo.store import backends
from ddpo.store.objects import Store

root, endpoint, tempfile.tempdir = sys.argv[1:]
backends.UPLOAD_PART_BYTES, backends.UPLOADED_AT_ONCE = 5 * 2**20, 1
store = Store.open(root, S3Options(endpoint_url=endpoint))
real = store._fs._call_s3

async def call(method, *words, **named):
    if method == "upload_part" and named["PartNumber"] == 3:
        print("two parts are there", flush=True)
        await asyncio.sleep(600)
    return await real(method, *words, **named)

store._fs._call_s3 = call
store.put(
    "checkpoints/run_id=R/epoch=00001/weights", ".bin", lambda file: file.write_bytes(bytes(2**24))
)
"""


def test_a_process_killed_while_it_uploads_leaves_no_object_and_no_file(
    bucket: Store, temporary: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    assert bucket.s3 is not None
    process = spawn(UPLOAD, bucket.root, bucket.s3.endpoint_url, temporary)
    assert process.stdout is not None and "two parts" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(temporary.iterdir())
    assert bucket.list(hidden=True) == []
    (left,) = uploads(bucket)
    assert left.startswith(f"{STEM}-")
    assert sweep(bucket, "R") == {}
    assert abort_uploads(bucket, "R", grace=timedelta(days=-1)) == [left]
    assert uploads(bucket) == []


# No room


def fill_the_disk(file: Path) -> None:
    Path("/dev/full").write_bytes(DATA)


def test_a_full_disk_is_named_and_nothing_is_left(store: Store, temporary: Path) -> None:
    with pytest.raises(StoreCallFailed, match=r"No space left.*Free some space there") as told:
        store.put(STEM, ".safetensors", fill_the_disk)
    place = store.root.removeprefix("file://") if "file://" in store.root else str(temporary)
    assert f"could not write {STEM} in {place}" in str(told.value)
    assert store.list(hidden=True) == [] and not list(temporary.iterdir())


def test_no_room_to_read_into_is_named(
    store: Store, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, *_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def fileno(self) -> int:
            return 0

    stored = store.put(STEM, ".safetensors", make)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    expected = f"could not read {stored.key} in {temporary}: .*Free some space there"
    with pytest.raises(StoreCallFailed, match=expected), store.fetch(stored):
        raise AssertionError("nobody reads it")


def test_what_the_system_says_of_a_file_of_tensors_is_an_os_error(tmp_path: Path) -> None:
    file = tmp_path / "tensors"
    file.touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            write_tensors({"a": torch.zeros(10_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [file]


# Memory

MEASURE = """
import os, sys, torch
from bench.memory import AnonymousMemory
from ddpo.config.s3 import S3Options
from ddpo.store.objects import Store
from ddpo.store.tensors import read_tensors, write_tensors

root, endpoint = sys.argv[1:]
store = Store.open(root, S3Options(endpoint_url=endpoint) if endpoint else None)
store.put("warm", ".bin", lambda file: file.write_bytes(b"up"))

def write(file):
    source = str(file) + "-zeros"
    with open(source, "wb") as zeros:
        zeros.truncate(2**29)
    tensor = torch.from_file(source, shared=True, size=2**27)
    os.unlink(source)
    write_tensors({"a": tensor}, file)

with AnonymousMemory() as put:
    stored = store.put("large", ".safetensors", write)
with AnonymousMemory() as got, store.fetch(stored) as file:
    total = float(read_tensors(file)[0]["a"].sum())
print(stored.size / 1e6, put.grown_mb, got.grown_mb, total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "seaweedfs"])
def test_half_a_gigabyte_needs_the_memory_of_a_few_blocks(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    spawn: Callable[..., subprocess.Popen[str]],
) -> None:
    """Cannot fail by chance: of blocks and parts, 100 MB are in memory at once, and a busy machine
    may miss a peak but not add to one.
    """
    with opened(kind, request, tmp_path) as store:
        endpoint = store.s3.endpoint_url if store.s3 else ""
        process = spawn(MEASURE, store.root, endpoint)
        size_mb, put_mb, got_mb, total = map(float, process.communicate(timeout=600)[0].split())
    assert size_mb > 500 and total == 0
    assert put_mb < 250 and got_mb < 250  # held as a whole, it would be 537 at least
