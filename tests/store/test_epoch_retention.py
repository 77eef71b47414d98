from __future__ import annotations

import pytest

from ddpo.config import Keep
from ddpo.errors import MissingObject, RetiredObject
from ddpo.store import keys, runs
from ddpo.store.documents import seal
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, EPOCH, ROLLOUTS, SCORES, Kind
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store, StoredObject
from ddpo.store.upkeep.epoch_retention import retire_epochs
from ddpo.store.upkeep.sweep import find_unreferenced
from ddpo.store.upkeep.verify import verify_run
from tests.store.records import record_fork

REWARD = "jpeg-01234567"
TREES = ("trajectories", "rollouts", "samples", "rewards", "statistics", "advantages")


def put(store: Store, stem: str) -> StoredObject:
    return store.put(stem, ".bin", stem.encode())


def epoch(store: Store, run_id: str, number: int, *, from_run: str | None = None) -> None:
    """Commit an epoch of one shard; `from_run` gives its rollouts, as a fork's first epoch has."""
    shard = Partition(run_id, number, 0)
    scored = Partition(run_id, number, 0, REWARD)
    whole = Partition(run_id, number, reward_id=REWARD)

    def committed(kind: Kind, where: Partition, owner: Partition) -> Ref:
        objects = {role: put(store, kind.stem(role, owner)) for role in kind.roles}
        return kind.commit(store, where, {}, objects).ref

    inputs = {
        "rollouts": [committed(ROLLOUTS, shard, Partition(from_run or run_id, number, 0))],
        "rewards": [committed(SCORES, scored, scored)],
        "advantages": [committed(ADVANTAGES, whole, whole)],
    }
    EPOCH.commit(store, Partition(run_id, number), inputs, {})


def begun(store: Store, run_id: str, number: int) -> None:
    """Commit the first checkpoint of a fork."""
    CHECKPOINT.commit(store, Partition(run_id, number), {}, {})


def epoch_of(key: str) -> int:
    parsed = keys.parse_object(key)
    assert parsed is not None
    return parsed[1].epoch


def kept(store: Store, run_id: str = "R") -> dict[str, list[int]]:
    """The epochs of which each tree still has an object of the run."""
    return {
        tree: sorted(epoch_of(key) for key in store.list(tree) if f"run_id={run_id}/" in key)
        for tree in TREES
    }


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        ("everything", ()),
        ("images_and_scores", ("trajectories",)),
        ("checkpoints", ("trajectories", "rollouts", "samples", "rewards", "statistics")),
    ],
)
def test_what_each_setting_keeps_of_old_epochs(
    store: Store, keep: Keep, gone: tuple[str, ...]
) -> None:
    for number in range(5):
        epoch(store, "R", number)
        epoch(store, "Other", number)
    before = store.list("manifests")
    retired = retire_epochs(store, "R", keep=keep, older_than=2)
    assert retired == ([0, 1, 2] if gone else [])
    assert kept(store) == {
        tree: [3, 4] if tree in gone else [0, 1, 2, 3, 4] for tree in TREES
    }  # fmt: skip
    assert kept(store, "Other") == {key: [0, 1, 2, 3, 4] for key in TREES}
    assert set(before) <= set(store.list("manifests"))
    assert retire_epochs(store, "R", keep=keep, older_than=2) == []


def test_what_is_dropped_reads_as_retired_and_not_as_damage(store: Store) -> None:
    for number in range(3):
        epoch(store, "R", number)
    store.put_if_absent(keys.run_key("R"), b"{}")
    retire_epochs(store, "R", keep="images_and_scores", older_than=1)
    found = ROLLOUTS.commit_of(store, Partition("R", 0, 0))
    assert found is not None
    record = keys.retired_key("trajectories", "R", 0)
    with pytest.raises(RetiredObject, match=record):
        store.get(found.manifest.objects["trajectories"])
    table = found.manifest.objects["rollouts"]
    assert store.get(table)
    verified = verify_run(store, "R")
    assert verified.retired == 2
    assert [damage.key for damage in verified.damages] == [keys.run_key("R")]  # it is no record
    store.delete(table.key)
    with pytest.raises(MissingObject) as caught:
        store.get(table)
    assert not isinstance(caught.value, RetiredObject)  # that one is a loss
    assert table.key in [damage.key for damage in verify_run(store, "R").damages]


def test_keeping_less_later_drops_what_was_kept_before(store: Store) -> None:
    for number in range(4):
        epoch(store, "R", number)
    assert retire_epochs(store, "R", keep="images_and_scores", older_than=1) == [0, 1, 2]
    assert retire_epochs(store, "R", keep="checkpoints", older_than=2) == [0, 1]
    assert kept(store)["trajectories"] == [3]
    assert kept(store)["rollouts"] == [2, 3]


def test_a_call_that_was_killed_is_finished_by_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        epoch(store, "R", number)
    right = Store.delete
    deletions = 0

    def dies(self: Store, key: str) -> None:
        nonlocal deletions
        deletions += 1
        if deletions == 5:
            raise KeyboardInterrupt
        right(self, key)

    monkeypatch.setattr(Store, "delete", dies)
    with pytest.raises(KeyboardInterrupt):
        retire_epochs(store, "R", keep="checkpoints", older_than=1)
    monkeypatch.undo()
    half = kept(store)
    assert half != {key: [0, 1, 2] for key in TREES}
    retire_epochs(store, "R", keep="checkpoints", older_than=1)
    assert kept(store) == {tree: [0, 1, 2] if tree == "advantages" else [2] for tree in TREES}


def test_what_a_fork_trains_on_stays(store: Store) -> None:
    for number in range(4):
        epoch(store, "R", number)
    epoch(store, "Fork", 1, from_run="R")
    epoch(store, "Fork", 2)
    retire_epochs(store, "R", keep="checkpoints", older_than=1)
    assert (
        kept(store)["trajectories"] == kept(store)["rollouts"] == kept(store)["samples"] == [1, 3]
    )
    assert kept(store)["rewards"] == [3]
    # The fork's own retention leaves the other run alone, too.
    retire_epochs(store, "Fork", keep="checkpoints", older_than=1)
    assert kept(store)["trajectories"] == [1, 3]


def test_all_epochs_that_forks_of_several_adopted_stay(store: Store) -> None:
    for number in range(8):
        epoch(store, "R", number)
    for fork, adopted in {"Fork": (1, 2, 3), "Other": (3, 4)}.items():
        for number in adopted:
            epoch(store, fork, number, from_run="R")
        epoch(store, fork, adopted[-1] + 1)
    assert retire_epochs(store, "R", keep="checkpoints", older_than=2) == [0, 1, 2, 3, 4, 5]
    assert (
        kept(store)["trajectories"]
        == kept(store)["rollouts"]
        == kept(store)["samples"]
        == [1, 2, 3, 4, 6, 7]
    )
    assert kept(store)["rewards"] == [6, 7]


def test_epochs_that_a_fork_is_still_to_adopt_stay_whole(store: Store) -> None:
    for number in range(7):
        epoch(store, "R", number)
    record_fork(store, "R", "Fork", 1, rollouts=3)
    begun(store, "Fork", 1)
    epoch(store, "Fork", 1, from_run="R")
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == [0, 1, 4, 5]
    assert (
        kept(store)["trajectories"]
        == kept(store)["rollouts"]
        == kept(store)["samples"]
        == [1, 2, 3, 6]
    )
    assert kept(store)["rewards"] == [2, 3, 6]
    # Without a record of retirement either, which would keep the fork from adopting them.
    gone = [n for n in range(7) if store.exists(keys.retired_key("samples", "R", n))]
    assert gone == [0, 1, 4, 5]
    # A fork that a person took away awaits nothing.
    store.delete(keys.run_key("Fork"))
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == [2, 3]


def test_samples_that_a_fork_is_still_to_score_for_its_statistics_stay(store: Store) -> None:
    for number in range(7):
        epoch(store, "R", number)
    record_fork(store, "R", "Forgetful", 2, statistics="reset")
    epoch(store, "Forgetful", 2, from_run="R")
    record_fork(store, "R", "Fork", 3)
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == [0, 1, 4, 5]
    assert kept(store)["rollouts"] == [0, 1, 2, 3, 6]
    assert kept(store)["trajectories"] == [2, 3, 6]  # scoring wants pictures alone
    # A fork of the fork goes back as far.
    begun(store, "Fork", 3)
    epoch(store, "Fork", 3, from_run="R")
    record_fork(store, "Fork", "Fork-of-it", 5)
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == [3]
    assert kept(store)["rewards"] == [0, 1, 2, 6]
    begun(store, "Fork-of-it", 5)
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == [0, 1, 2]
    assert kept(store)["rewards"] == [6]


@pytest.mark.parametrize("parent", [None, "Another"])
def test_a_run_that_came_after_a_fork_of_its_name_awaits_nothing_of_the_forks(
    local_store: Store, parent: str | None
) -> None:
    for number in range(4):
        epoch(local_store, "R", number)
    record_fork(local_store, "R", "Fork", 1)
    local_store.delete(keys.run_key("Fork"))
    if parent:
        record_fork(local_store, parent, "Fork", 0, rollouts=3)
    else:
        runs.create_or_check_run(local_store, "Fork", identity={}, numerics={}, code={})
    assert retire_epochs(local_store, "R", keep="checkpoints", older_than=1) == [0, 1, 2]


def test_a_fork_whose_record_cannot_be_read_only_puts_it_off(store: Store) -> None:
    for number in range(3):
        epoch(store, "R", number)
    record_fork(store, "R", "Fork", 1)
    whole = runs.load_run(store, "Fork").model_dump(mode="json")
    unknown = whole | {"identity": {"fork": {"run_id": "R", "epoch": "the first"}}}
    for broken in (b"no record", seal(unknown)):
        store.delete(keys.run_key("Fork"))
        store.put_if_absent(keys.run_key("Fork"), broken)
        assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == []
        assert kept(store) == {tree: [0, 1, 2] for tree in TREES}


def test_an_epoch_that_is_not_committed_is_left_alone(store: Store) -> None:
    epoch(store, "R", 0)
    put(store, ROLLOUTS.stem("trajectories", Partition("R", 1, 0)))
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == []
    assert kept(store)["trajectories"] == [0, 1]
    assert find_unreferenced(store, "R") == {}  # it is young


def test_another_run_that_cannot_be_read_only_puts_it_off(store: Store) -> None:
    for number in range(3):
        epoch(store, "R", number)
    store.put_if_absent(ROLLOUTS.key(Partition("Broken", 0, 0)), b"no manifest")
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == []
    assert kept(store) == {tree: [0, 1, 2] for tree in TREES}
    store.delete(ROLLOUTS.key(Partition("Broken", 0, 0)))
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == [0, 1]


def test_an_epoch_whose_commit_was_taken_away_is_left_alone(store: Store) -> None:
    for number in range(3):
        epoch(store, "R", number)
    store.delete(EPOCH.key(Partition("R", 0)))
    assert retire_epochs(store, "R", keep="checkpoints", older_than=1) == [1]
    assert kept(store)["trajectories"] == [0, 2]
