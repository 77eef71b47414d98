from __future__ import annotations

import pytest

from ddpo.errors import InvalidKey
from ddpo.store import keys

REWARD = "aesthetic-0123abcd"


def test_keys_are_laid_out_as_documented() -> None:
    assert keys.run_key("R") == "runs/R/run.json"
    assert keys.start_key("R", 1) == "runs/R/starts/00001.json"
    assert keys.rollout_stem("R", 3, 2) == "rollouts/run_id=R/epoch=00003/shard-00002"
    assert keys.trajectory_stem("R", 3, 2) == "trajectories/run_id=R/epoch=00003/shard-00002"
    partition = f"reward_name={REWARD}/run_id=R/epoch=00003"
    assert keys.reward_stem(REWARD, "R", 3, 2) == f"rewards/{partition}/shard-00002"
    assert keys.advantage_stem(REWARD, "R", 3) == f"advantages/{partition}/part"
    assert keys.checkpoint_stem("R", 3, "weights") == "checkpoints/run_id=R/epoch=00003/weights"
    manifests = {
        keys.rollout_manifest_key("R", 3, 2): "rollouts/run_id=R/epoch=00003/shard-00002.json",
        keys.reward_manifest_key(REWARD, "R", 3, 2): f"rewards/{partition}/shard-00002.json",
        keys.advantage_manifest_key(REWARD, "R", 3): f"advantages/{partition}.json",
        keys.checkpoint_manifest_key("R", 3): "checkpoints/run_id=R/epoch=00003.json",
        keys.epoch_manifest_key("R", 3): "epochs/run_id=R/epoch=00003.json",
        keys.retired_checkpoint_key("R", 3): "retired/checkpoints/run_id=R/epoch=00003.json",
    }
    assert all(key == f"manifests/{rest}" for key, rest in manifests.items())


def test_checkpoint_keys_are_parsed_back() -> None:
    stem = keys.checkpoint_stem("R.1", 42, "weights")
    assert keys.parse_checkpoint_object(f"{stem}-0123456789ab.safetensors") == ("R.1", 42)
    assert keys.parse_checkpoint_manifest(keys.checkpoint_manifest_key("R.1", 42)) == ("R.1", 42)
    assert keys.parse_checkpoint_object(keys.rollout_stem("R", 1, 1)) is None
    assert keys.parse_checkpoint_manifest(keys.retired_checkpoint_key("R", 1)) is None


def test_sample_ids_sort_as_text_in_the_order_of_epochs_and_indices() -> None:
    assert keys.sample_id("R", 3, 17) == "R/00003/000017"
    numbers = [(0, 0), (0, 9), (0, 10), (9, 99), (10, 0), (99_999, 999_999)]
    ids = [keys.sample_id("R", epoch, index) for epoch, index in numbers]
    assert ids == sorted(ids)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keys.sample_id("R", 0, 1_000_000),
        lambda: keys.sample_id("R", 100_000, 0),
        lambda: keys.rollout_stem("R", 0, -1),
        lambda: keys.checkpoint_stem("R", 0, "../../elsewhere"),
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
        keys.reward_stem(reward_id, "R", 0, 0)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a/../b", "..", "a//b", "a/", "./a", "a\\b", "a b", "a\0", "~/a"]
)
def test_keys_that_could_leave_the_root_are_refused(key: str) -> None:
    with pytest.raises(InvalidKey):
        keys.check_key(key)
