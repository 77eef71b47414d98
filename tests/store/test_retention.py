from __future__ import annotations

import pytest

from ddpo.errors import InvalidRetention, MissingObject, RetiredObject
from ddpo.store import keys, manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store, StoredObject
from ddpo.store.upkeep.retention import is_retired, retire_checkpoints
from tests.store.records import record_fork


def checkpoint(store: Store, run_id: str, epoch: int, **shared: StoredObject) -> None:
    stem = CHECKPOINT.stem("weights", Partition(run_id, epoch))
    weights = store.put(stem, ".safetensors", f"weights {epoch}".encode())
    commit(store, run_id, epoch, {"weights": weights, **shared})


def commit(store: Store, run_id: str, epoch: int, objects: dict[str, StoredObject]) -> None:
    key = CHECKPOINT.key(Partition(run_id, epoch))
    inputs = {"run_id": run_id, "epoch": epoch}
    manifests.commit(store, key, kind="checkpoint", inputs=inputs, objects=objects)


def objects_of(store: Store, run_id: str, epoch: int) -> dict[str, StoredObject]:
    found = CHECKPOINT.commit_of(store, Partition(run_id, epoch))
    assert found is not None
    return dict(found.manifest.objects)


def readable(store: Store, run_id: str, epochs: range) -> list[int]:
    return [e for e in epochs if store.exists(objects_of(store, run_id, e)["weights"].key)]


def test_the_newest_and_every_nth_stay_and_every_manifest_does(store: Store) -> None:
    for epoch in range(12):
        checkpoint(store, "R", epoch)
    retired = retire_checkpoints(store, "R", keep_newest=2, keep_every=5)
    assert retired == [1, 2, 3, 4, 6, 7, 8, 9]
    assert readable(store, "R", range(12)) == [0, 5, 10, 11]
    assert [epoch for epoch in range(12) if is_retired(store, "R", epoch)] == retired
    assert retire_checkpoints(store, "R", keep_newest=2, keep_every=5) == []


def test_the_documents_of_a_retired_checkpoint_stay(store: Store) -> None:
    for epoch in range(2):
        metrics = store.put(CHECKPOINT.stem("metrics", Partition("R", epoch)), ".json", b"{}")
        checkpoint(store, "R", epoch, metrics=metrics)
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == [0]
    assert readable(store, "R", range(2)) == [1]
    document = objects_of(store, "R", 0)["metrics"]
    assert store.get(document) == b"{}"
    store.delete(document.key)
    with pytest.raises(MissingObject) as caught:
        store.get(document)
    assert not isinstance(caught.value, RetiredObject)  # that one is a loss


def test_without_keep_every_only_the_newest_stay(store: Store) -> None:
    for epoch in range(4):
        checkpoint(store, "R", epoch)
    assert retire_checkpoints(store, "R", keep_newest=10, keep_every=None) == []
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == [0, 1, 2]
    assert readable(store, "R", range(4)) == [3]


def test_a_retired_object_reads_as_retired_and_a_lost_one_as_missing(store: Store) -> None:
    for epoch in range(3):
        checkpoint(store, "R", epoch)
    retire_checkpoints(store, "R", keep_newest=2, keep_every=None)
    with pytest.raises(RetiredObject, match=keys.retired_key("checkpoints", "R", 0)):
        store.get(objects_of(store, "R", 0)["weights"])
    lost = objects_of(store, "R", 1)["weights"]
    store.delete(lost.key)
    with pytest.raises(MissingObject) as caught:
        store.get(lost)
    assert not isinstance(caught.value, RetiredObject)


def test_an_object_that_a_kept_checkpoint_refers_to_stays(store: Store) -> None:
    shared = store.put(
        keys.object_stem("checkpoints", Partition("R", 0), "base"), ".safetensors", b"shared"
    )
    for epoch in range(3):
        checkpoint(store, "R", epoch, base=shared)
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == [0, 1]
    assert readable(store, "R", range(3)) == [2]
    assert store.get(shared) == b"shared"


def test_what_a_fork_started_from_stays(store: Store) -> None:
    for epoch in range(3):
        checkpoint(store, "R", epoch)
    commit(store, "Fork", 1, objects_of(store, "R", 1))
    checkpoint(store, "Fork", 2)
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == [0]
    assert store.get(objects_of(store, "Fork", 1)["weights"]) == b"weights 1"


def test_the_checkpoint_that_a_fork_is_still_to_start_from_stays(store: Store) -> None:
    for epoch in range(4):
        checkpoint(store, "R", epoch)
    record_fork(store, "R", "Fork", 1)
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == [0, 2]
    assert not is_retired(store, "R", 1)  # which would keep the fork from starting
    # Begun, it needs what it refers to, and no more.
    checkpoint(store, "Fork", 1)
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == [1]


def test_a_fork_that_cannot_be_read_puts_the_retirement_of_checkpoints_off(store: Store) -> None:
    for epoch in range(2):
        checkpoint(store, "R", epoch)
    record_fork(store, "R", "Fork", 1)
    store.delete(keys.run_key("Fork"))
    store.put_if_absent(keys.run_key("Fork"), b"no record")
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == []
    assert not is_retired(store, "R", 0)


def test_what_a_retired_checkpoint_of_a_fork_refers_to_may_go(store: Store) -> None:
    for epoch in range(2):
        checkpoint(store, "R", epoch)
    checkpoint(store, "Fork", 0, base=objects_of(store, "R", 0)["weights"])
    checkpoint(store, "Fork", 1)
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == []
    assert retire_checkpoints(store, "Fork", keep_newest=1, keep_every=None) == [0]
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == [0]


def test_a_forks_own_retention_leaves_the_other_run_alone(store: Store) -> None:
    for epoch in range(3):
        checkpoint(store, "R", epoch)
    commit(store, "Fork", 1, objects_of(store, "R", 1))
    for epoch in range(2, 5):
        base = {} if epoch == 4 else {"base": objects_of(store, "R", 0)["weights"]}
        checkpoint(store, "Fork", epoch, **base)
    assert retire_checkpoints(store, "Fork", keep_newest=1, keep_every=None) == [2, 3]
    assert readable(store, "R", range(3)) == [0, 1, 2]


def test_a_fork_that_commits_during_a_retirement_keeps_its_start_or_learns_of_it(
    store: Store, monkeypatch
) -> None:
    for epoch in range(2):
        checkpoint(store, "R", epoch)
    real = manifests.commit
    told: list[bool] = []

    def fork_first(*arguments, **named):
        monkeypatch.setattr(manifests, "commit", real)
        commit(store, "Fork", 0, objects_of(store, "R", 0))
        told.append(is_retired(store, "R", 0))
        return real(*arguments, **named)

    monkeypatch.setattr(manifests, "commit", fork_first)
    retire_checkpoints(store, "R", keep_newest=1, keep_every=None)
    assert told == [False]
    assert store.get(objects_of(store, "Fork", 0)["weights"]) == b"weights 0"


def test_objects_that_are_not_committed_yet_are_left_alone(store: Store) -> None:
    for epoch in range(3):
        checkpoint(store, "R", epoch)
    pending = store.put(CHECKPOINT.stem("weights", Partition("R", 3)), ".safetensors", b"pending")
    torn = store.put(CHECKPOINT.stem("weights", Partition("R", 0)), ".safetensors", b"another try")
    retire_checkpoints(store, "R", keep_newest=1, keep_every=None)
    assert store.get(pending) == b"pending"
    assert store.get(torn) == b"another try"


@pytest.mark.parametrize("survivors", [0, 1, 2, 3])
def test_a_retirement_that_was_killed_is_finished_by_the_next(
    store: Store, monkeypatch, survivors: int
) -> None:
    for epoch in range(4):
        checkpoint(store, "R", epoch)
    real, calls = store.delete, []

    def dies(key: str) -> None:
        if len(calls) == 3 - survivors:
            raise KeyboardInterrupt
        calls.append(key)
        real(key)

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", dies)
        if survivors:
            with pytest.raises(KeyboardInterrupt):
                retire_checkpoints(store, "R", keep_newest=1, keep_every=None)
    retired = retire_checkpoints(store, "R", keep_newest=1, keep_every=None)
    assert len(retired) == (survivors or 3)
    assert readable(store, "R", range(4)) == [3]
    with pytest.raises(RetiredObject):
        store.get(objects_of(store, "R", 0)["weights"])


def test_a_rule_that_keeps_nothing_is_refused(store: Store) -> None:
    checkpoint(store, "R", 0)
    for newest, every in [(0, None), (1, 0), (-1, 5)]:
        with pytest.raises(InvalidRetention):
            retire_checkpoints(store, "R", keep_newest=newest, keep_every=every)
    assert readable(store, "R", range(1)) == [0]


def test_a_checkpoint_that_a_resume_needs_stays_beside_one_that_is_further_ahead(
    store: Store,
) -> None:
    for epoch in range(4):
        checkpoint(store, "R", epoch)
    retired = retire_checkpoints(store, "R", keep_newest=1, keep_every=None, needed_from=2)
    assert retired == [0, 1]
    assert readable(store, "R", range(4)) == [2, 3]


def test_another_run_that_cannot_be_read_only_puts_it_off(store: Store) -> None:
    for epoch in range(3):
        checkpoint(store, "R", epoch)
    broken = CHECKPOINT.key(Partition("Broken", 0))
    store.put_if_absent(broken, b"no manifest")
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == []
    assert readable(store, "R", range(3)) == [0, 1, 2]
    store.delete(broken)
    assert retire_checkpoints(store, "R", keep_newest=1, keep_every=None) == [0, 1]
