"""Garbage collection takes what nobody refers to, and only once it is old."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ddpo.store import manifests, objects
from ddpo.store.objects import Store
from ddpo.store.sweep import find_unreferenced, sweep

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
