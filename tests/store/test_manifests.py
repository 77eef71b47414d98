from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from ddpo.basics.digests import sha256_bytes
from ddpo.errors import (
    ConflictingCommit,
    CorruptObject,
    MissingObject,
    StoreError,
    UnknownSchema,
    UnreadableData,
)
from ddpo.store import manifests
from ddpo.store.documents import seal
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from ddpo.store.manifests import Manifest, Ref, commit, find, load
from ddpo.store.objects import Store

KEY = ROLLOUTS.key(Partition("R", 3, 2))
INPUTS = {"policy": "p1", "sampler": {"steps": 20, "eta": 1.0}, "seeds": [1, 2]}


def committed(store: Store, data: bytes = b"a", **changes: object) -> manifests.Committed:
    objects = {"table": store.put("rollouts/x", ".bin", data)}
    return commit(store, KEY, kind="rollouts", inputs={**INPUTS, **changes}, objects=objects)


def test_a_commit_is_found_by_key_and_loaded_by_reference(store: Store) -> None:
    assert find(store, KEY) is None
    made = committed(store)
    assert not made.diverged
    found = find(store, KEY, inputs=INPUTS)
    assert found is not None
    assert (found.ref, found.manifest) == (made.ref, made.manifest)
    assert load(store, made.ref) == made.manifest
    assert store.get(made.manifest.objects["table"]) == b"a"
    assert made.ref == Ref(key=KEY, sha256=sha256_bytes(store.read(KEY)))


def test_a_later_writer_of_the_same_inputs_adopts(store: Store) -> None:
    first, again = committed(store), committed(store)
    assert (again.diverged, again.ref) == (False, first.ref)


def test_an_adopter_whose_bytes_differ_says_so_and_gets_the_first_bytes(store: Store) -> None:
    first, other = committed(store, b"a"), committed(store, b"b")
    assert (other.diverged, other.ref) == (True, first.ref)
    assert store.get(other.manifest.objects["table"]) == b"a"


def test_a_writer_of_other_inputs_is_refused_with_every_difference(store: Store) -> None:
    first = committed(store)
    with pytest.raises(ConflictingCommit) as caught:
        committed(store, policy="p2", sampler={"steps": 50, "eta": 1.0}, extra=True)
    assert [str(difference) for difference in caught.value.differences] == [
        "extra: absent in the store, true in the config",
        'policy: "p1" in the store, "p2" in the config',
        "sampler.steps: 20 in the store, 50 in the config",
    ]
    assert KEY in str(caught.value)
    assert "sampler.steps" in str(caught.value)
    with pytest.raises(ConflictingCommit, match="policy"):
        find(store, KEY, inputs={**INPUTS, "policy": "p2"})
    with pytest.raises(ConflictingCommit, match="kind"):
        commit(store, KEY, kind="rewards", inputs=INPUTS, objects={})
    assert load(store, first.ref) == first.manifest


def test_inputs_that_python_calls_equal_but_json_does_not_conflict(store: Store) -> None:
    committed(store, flag=1)
    with pytest.raises(ConflictingCommit, match="flag: 1 in the store, true in the config"):
        committed(store, flag=True)


def test_equal_commits_have_equal_bytes_in_any_store(store: Store, memory_store: Store) -> None:
    assert committed(store).ref == committed(memory_store).ref
    document = json.loads(store.read(KEY))
    assert sorted(document) == ["checksum", "inputs", "kind", "objects", "schema_version"]


def test_racing_threads_commit_once_and_all_get_the_same(raced_store: Store) -> None:
    barrier = Barrier(16)

    def race(number: int) -> manifests.Committed:
        data = bytes([number])
        barrier.wait()
        return committed(raced_store, data)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(race, range(16)))
    assert [result.diverged for result in results].count(False) == 1
    assert len({result.ref.sha256 for result in results}) == 1


RACER = """
import sys, time
from pathlib import Path
from ddpo.store.manifests import commit
from ddpo.store.objects import Store

root, key, number, folder = sys.argv[1:]
store = Store.open(root)
objects = {"table": store.put("rollouts/x", ".bin", number.encode() * 1000)}
Path(folder, number).touch()
while not Path(folder, "go").exists():
    time.sleep(0.001)
for attempt in range(20):
    made = commit(store, key.replace("N", str(attempt)), kind="k", inputs={"a": 1}, objects=objects)
    print(made.diverged, made.ref.sha256)
"""


@pytest.mark.slow
def test_racing_processes_commit_once_and_all_get_the_same(
    local_store: Store, spawn: Callable, tmp_path: Path
) -> None:
    racers = [spawn(RACER, local_store.root, "manifests/N.json", n, tmp_path) for n in range(8)]
    while not all((tmp_path / str(number)).exists() for number in range(8)):
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.02)
    (tmp_path / "go").touch()
    outputs = [racer.communicate(timeout=300)[0].splitlines() for racer in racers]
    for attempt in range(20):
        results = [output[attempt].split() for output in outputs]
        assert sorted(result[0] for result in results) == ["False"] + ["True"] * 7
        assert len({result[1] for result in results}) == 1


def test_no_flipped_byte_of_a_manifest_goes_unnoticed(memory_store: Store) -> None:
    made = committed(memory_store)
    whole = memory_store.read(KEY)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        memory_store.delete(KEY)
        memory_store.put_if_absent(KEY, bytes(damaged))
        with pytest.raises(StoreError, match=KEY):
            find(memory_store, KEY)
        with pytest.raises(CorruptObject, match=made.ref.sha256):
            load(memory_store, made.ref)


def test_a_cut_or_deleted_manifest_is_named(store: Store) -> None:
    made = committed(store)
    whole = store.read(KEY)
    store.delete(KEY)
    with pytest.raises(MissingObject, match=KEY):
        load(store, made.ref)
    store.put_if_absent(KEY, whole[:-10])
    with pytest.raises(UnreadableData, match=KEY):
        find(store, KEY)
    with pytest.raises(UnreadableData, match=KEY):  # nor does a writer commit over it
        committed(store)


@pytest.mark.parametrize("text", [b"[]", b"NaN", b'"\\ud800"', b"\xff", b'{"a": NaN}', b""])
def test_bytes_that_are_no_document_are_named(memory_store: Store, text: bytes) -> None:
    memory_store.put_if_absent(KEY, text)
    with pytest.raises(StoreError, match=KEY):
        find(memory_store, KEY)


def test_manifests_of_another_schema_are_refused(store: Store) -> None:
    manifest = Manifest(schema_version=2, kind="k", inputs={}, objects={})
    store.put_if_absent(KEY, manifest.to_bytes())
    with pytest.raises(UnknownSchema, match=r"schema version 2, this release reads 1"):
        load(store, Ref(key=KEY, sha256=sha256_bytes(manifest.to_bytes())))


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "a/../b", "a b", "s3://a/b"])
def test_a_manifest_cannot_point_outside_of_the_store(store: Store, key: str) -> None:
    document = committed(store).manifest.model_dump(mode="json")
    document["objects"]["table"]["key"] = key
    store.delete(KEY)
    store.put_if_absent(KEY, seal(document))
    with pytest.raises(UnreadableData, match=r"objects\.table\.key"):
        find(store, KEY)
