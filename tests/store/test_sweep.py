"""Garbage collection takes what nobody refers to, and only once it is old."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ddpo.errors import MissingObject, StoreCallFailed
from ddpo.store import manifests, objects
from ddpo.store.backends import TEMPORARY_PREFIX
from ddpo.store.objects import Store
from ddpo.store.upkeep.sweep import find_unreferenced, sweep

STEM = "rollouts/run_id=R/epoch=00000/shard-00000"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two days ahead: everything that was just written is old."""
    monkeypatch.setattr(objects, "now", lambda: datetime.now(UTC) + timedelta(days=2))


def commit(store: Store, data: bytes, run: str = "R", stem: str = STEM) -> str:
    stored = store.put(stem, ".parquet", data)
    key = f"manifests/rollouts/run_id={run}/epoch=00000/shard-00000.json"
    manifests.commit(store, key, kind="rollouts", inputs={}, objects={"rollouts": stored})
    return stored.key


def test_only_old_objects_without_a_manifest_go(store: Store, later: None) -> None:
    kept = commit(store, b"committed")
    lost = store.put(STEM, ".parquet", b"lost against the other").key
    other_run = store.put(STEM.replace("=R", "=S"), ".parquet", b"of another run").key
    assert find_unreferenced(store, "R") == {lost: 22}
    assert store.exists(lost)
    assert sweep(store, "R") == {lost: 22}
    assert not store.exists(lost)
    assert store.exists(kept) and store.exists(other_run)
    assert sweep(store, "R") == {}
    manifest = manifests.find(store, "manifests/rollouts/run_id=R/epoch=00000/shard-00000.json")
    assert manifest is not None


def test_young_objects_stay(store: Store) -> None:
    young = store.put(STEM, ".parquet", b"a task is about to commit this").key
    assert sweep(store, "R") == {}
    assert store.exists(young)


def test_what_another_run_refers_to_stays(store: Store, later: None) -> None:
    """A fork's first epoch lists objects of the run it came from."""
    shared = commit(store, b"shared", run="fork")
    assert "/run_id=R/" in shared
    assert sweep(store, "R") == {}


def test_a_grace_period_in_which_puts_trust_what_they_find_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="expected more than 1:00:00"):
        sweep(store, "R", grace=timedelta(minutes=30))


def test_an_old_object_is_written_again_before_it_is_committed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the sweep could take it between the look and the commit."""
    stored = store.put(STEM, ".parquet", b"found")
    written: list[str] = []
    write = store._backend.write
    monkeypatch.setattr(
        store._backend, "write", lambda path, data: (written.append(path), write(path, data))
    )
    store.put(STEM, ".parquet", b"found")
    assert written == []
    monkeypatch.setattr(objects, "now", lambda: datetime.now(UTC) + timedelta(hours=2))
    store.put(STEM, ".parquet", b"found")
    assert len(written) == 1 and written[0].endswith(stored.key)


def test_ages_are_times_of_writing(store: Store) -> None:
    key = store.put(STEM, ".parquet", b"12345").key
    size, modified = store.ages()[key]
    assert size == 5
    assert abs(datetime.now(UTC) - modified) < timedelta(minutes=1)


def test_what_was_committed_between_the_look_and_the_deletion_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed task finds the object of a killed one, writes it again, commits it."""
    left = store.put(STEM, ".parquet", b"made twice").key
    ahead = [timedelta(days=2)]
    monkeypatch.setattr(objects, "now", lambda: datetime.now(UTC) + ahead[0])
    look = find_unreferenced

    def look_and_lose_the_race(*arguments, **named):
        found = look(*arguments, **named)
        ahead[0] = timedelta()  # written and committed just now
        commit(store, b"made twice")
        return found

    monkeypatch.setattr("ddpo.store.upkeep.sweep.find_unreferenced", look_and_lose_the_race)
    assert sweep(store, "R") == {}
    assert store.exists(left)


def test_a_lost_manifest_stops_the_sweep(store: Store, later: None) -> None:
    """What it listed cannot be told from garbage any more."""
    committed = commit(store, b"whole")
    manifest = manifests.find(store, "manifests/rollouts/run_id=R/epoch=00000/shard-00000.json")
    assert manifest is not None
    manifests.commit(
        store,
        "manifests/epochs/run_id=R/epoch=00000.json",
        kind="epoch",
        inputs={"rollouts": [manifest.ref.model_dump()]},
        objects={},
    )
    store.delete(manifest.ref.key)
    with pytest.raises(MissingObject, match=manifest.ref.key):
        sweep(store, "R")
    assert store.exists(committed)


def test_an_unfinished_file_of_a_killed_writer_goes(local_store: Store, later: None) -> None:
    key = commit(local_store, b"whole")
    path = Path(local_store.url(key).removeprefix("file://")).with_name(".tmp-cut-off")
    path.write_bytes(b"half")
    assert list(sweep(local_store, "R").values()) == [4]
    assert not path.exists()


def test_the_lease_of_a_dead_process_and_an_unfinished_record_go(
    local_store: Store, later: None
) -> None:
    left = {"runs/R/lease.json", f"runs/R/{TEMPORARY_PREFIX}lease"}
    kept = {"runs/R/run.json", "runs/R/starts/00001.json", "runs/S/lease.json"}
    for key in left | kept:
        local_store.replace(key, b"{}")
    assert set(sweep(local_store, "R")) == left
    assert set(local_store.list(hidden=True)) == kept


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_one(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(local_store, b"whole")
    fs = local_store._fs
    look = fs.ls

    def refuse(path: str, *arguments, **named):
        if path.rstrip("/").endswith("/rollouts"):
            raise PermissionError(path)
        return look(path, *arguments, **named)

    monkeypatch.setattr(fs, "ls", refuse)
    with pytest.raises(StoreCallFailed, match="list"):
        local_store.list("manifests")
