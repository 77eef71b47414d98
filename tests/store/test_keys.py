from __future__ import annotations

import pytest

from ddpo.errors import InvalidKey
from ddpo.store import keys
from ddpo.store.checkpoints import TENSOR_ROLES
from ddpo.store.keys import Partition
from ddpo.store.kinds import (
    ADVANTAGES,
    CHECKPOINT,
    EPOCH,
    IMAGES,
    KINDS,
    ROLLOUTS,
    SCORES,
    STATISTICS,
    Kind,
)

REWARD = "aesthetic-0123abcd"


def test_keys_are_laid_out_as_documented() -> None:
    assert keys.run_key("R") == "runs/R/run.json"
    assert keys.start_key("R", 1) == "runs/R/starts/00001.json"
    shard, state = Partition("R", 3, 2), Partition("R", 3)
    scored, whole = Partition("R", 3, 2, REWARD), Partition("R", 3, reward_id=REWARD)
    images = Partition("R", 3, images_id="0123abcd")
    partition = f"reward_name={REWARD}/run_id=R/epoch=00003"
    for role, tree in (("rollouts",) * 2, ("samples",) * 2, ("trajectories",) * 2):
        assert ROLLOUTS.stem(role, shard) == f"{tree}/run_id=R/epoch=00003/shard-00002"
    assert SCORES.stem("rewards", scored) == f"rewards/{partition}/shard-00002"
    assert ADVANTAGES.stem("advantages", whole) == f"advantages/{partition}/part"
    assert ADVANTAGES.stem("statistics", whole) == f"statistics/{partition}/part"
    assert STATISTICS.stem("statistics", whole) == f"statistics/{partition}/part"
    assert CHECKPOINT.stem("weights", state) == "checkpoints/run_id=R/epoch=00003/weights"
    fixed = "pictures_name=0123abcd/run_id=R/epoch=00003"
    assert IMAGES.stem("pictures", images) == f"pictures/{fixed}/part"
    manifests = {
        ROLLOUTS.key(shard): "rollouts/run_id=R/epoch=00003/shard-00002.json",
        SCORES.key(scored): f"rewards/{partition}/shard-00002.json",
        ADVANTAGES.key(whole): f"advantages/{partition}.json",
        STATISTICS.key(whole): f"statistics/{partition}.json",
        CHECKPOINT.key(state): "checkpoints/run_id=R/epoch=00003.json",
        IMAGES.key(images): f"pictures/{fixed}.json",
        EPOCH.key(state): "epochs/run_id=R/epoch=00003.json",
        keys.retired_key("checkpoints", "R", 3): "retired/checkpoints/run_id=R/epoch=00003.json",
        keys.retired_key("samples", "R", 3): "retired/samples/run_id=R/epoch=00003.json",
    }
    assert all(key == f"manifests/{rest}" for key, rest in manifests.items())


WHERE = {
    "shard": {"shard": 7},
    "reward_id": {"reward_id": REWARD},
    "images_id": {"images_id": "0123abcd"},
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_key_of_every_kind_is_parsed_back(kind: Kind) -> None:
    parts = {name: value for part in kind.partitions for name, value in WHERE[part].items()}
    where = Partition("R.1", 42, **parts)
    assert kind.parse(kind.key(where)) == where
    for other in KINDS:
        assert (other.parse(kind.key(where)) is None) == (other is not kind)
    for role, described in kind.roles.items():
        key = f"{kind.stem(role, where)}-0123456789ab{described.suffix}"
        assert keys.parse_object(key) == (described.folder, where)
        assert kind.parse(key) is None
    assert keys.parse_object(kind.key(where)) is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_refuses_a_partition_that_is_not_one_of_its_own(kind: Kind) -> None:
    for name in WHERE:
        wrong = kind.partitions ^ {name}
        parts = {name: part for name in wrong for part in WHERE[name].values()}
        with pytest.raises(ValueError, match=kind.name):
            kind.key(Partition("R", 0, **parts))


def test_the_record_of_a_deletion_is_found_from_the_object() -> None:
    shard, scored = Partition("R", 3, 2), Partition("R", 3, 2, REWARD)
    whole, state = Partition("R", 3, reward_id=REWARD), Partition("R", 3)
    samples = keys.retired_key("samples", "R", 3)
    assert {
        kind.stem(role, where): keys.retirement_of(
            f"{kind.stem(role, where)}-0123456789ab{described.suffix}"
        )
        for kind, where in (
            (ROLLOUTS, shard),
            (SCORES, scored),
            (ADVANTAGES, whole),
            (CHECKPOINT, state),
        )
        for role, described in kind.roles.items()
    } == {
        ROLLOUTS.stem("rollouts", shard): samples,
        ROLLOUTS.stem("samples", shard): samples,
        ROLLOUTS.stem("trajectories", shard): keys.retired_key("trajectories", "R", 3),
        SCORES.stem("rewards", scored): samples,
        ADVANTAGES.stem("advantages", whole): None,
        ADVANTAGES.stem("statistics", whole): samples,
        **{
            CHECKPOINT.stem(role, state): keys.retired_key("checkpoints", "R", 3)
            if role in TENSOR_ROLES
            else None
            for role in CHECKPOINT.roles
        },
    }


def test_sample_ids_sort_as_text_in_the_order_of_epochs_and_indices() -> None:
    assert keys.sample_id("R", 3, 17) == "R/00003/000017"
    assert keys.parse_sample_id("R/00003/000017") == ("R", 3, 17)
    assert keys.parse_sample_id("R/3/17") is None
    numbers = [(0, 0), (0, 9), (0, 10), (9, 99), (10, 0), (99_999, 999_999)]
    ids = [keys.sample_id("R", epoch, index) for epoch, index in numbers]
    assert ids == sorted(ids)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keys.sample_id("R", 0, 1_000_000),
        lambda: keys.sample_id("R", 100_000, 0),
        lambda: ROLLOUTS.stem("rollouts", Partition("R", 0, -1)),
        lambda: keys.object_stem("checkpoints", Partition("R", 0), "../../elsewhere"),
    ],
)
def test_numbers_and_names_that_would_break_the_layout_are_refused(make) -> None:
    with pytest.raises(InvalidKey):
        make()


@pytest.mark.parametrize(
    "run_id", ["", "1", "-a", ".a", "a b", "a/b", "..", "a\n", "é", "a" * 101, "a=b"]
)
def test_run_ids_outside_the_whitelist_are_refused(run_id: str) -> None:
    with pytest.raises(InvalidKey, match="run id"):
        keys.validate_run_id(run_id)


def test_run_ids_inside_the_whitelist_are_kept() -> None:
    for run_id in ("R", "a-1_b.C", "a" * 100):
        assert keys.validate_run_id(run_id) == run_id


@pytest.mark.parametrize(
    "reward_id", ["a", "a-0123abc", "a-0123ABCD", "1-0123abcd", "a/b-0123abcd"]
)
def test_reward_ids_without_a_digest_are_refused(reward_id: str) -> None:
    with pytest.raises(InvalidKey, match="reward id"):
        SCORES.key(Partition("R", 0, 0, reward_id))


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a/../b", "..", "a//b", "a/", "./a", "a\\b", "a b", "a\0", "~/a"]
)
def test_keys_that_could_leave_the_root_are_refused(key: str) -> None:
    with pytest.raises(InvalidKey):
        keys.check_key(key)
