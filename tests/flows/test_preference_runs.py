"""Diffusion-DPO on people's preference pairs: what is stored, resumed, forked and refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpo.analysis.hf_dataset import write_dataset
from ddpo.analysis.history import History
from ddpo.basics.images import decode_image
from ddpo.errors import ConfigError, RunIdentityMismatch
from ddpo.runs import Run, check_run, open_run, start_run
from ddpo.runs.forks.plan import fork_config
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, ROLLOUTS, SCORES
from ddpo.store.upkeep.verify import verify_run
from ddpo_workflow.flows.cli.doctor import examine
from tests.fold import as_in_a_new_process, run_epochs
from tests.preference_pairs import write_pairs
from tests.tiny import assert_same_tensors, load_policy, tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    as_in_a_new_process()


def config_of(model: Path, root: Path, pairs: Path, **changes: Any) -> Any:
    given = {
        "storage": {"root": str(root)},
        "preferences": {"path": str(pairs)},
        "reward": {"name": "preference"},
        "rollouts": {"samples_per_prompt": 2},
        "algorithm": {"type": "dpo", "beta": 100.0, "updates_per_epoch": 2},
        **changes,
    }
    return tiny_config(model, **given)


def content(run: Run) -> dict[str, bytes]:
    return {key: run.store.read(key) for key in run.store.list() if not key.startswith("runs/")}


def weights(run: Run, epoch: int) -> dict[str, torch.Tensor]:
    return CHECKPOINT.require(run.store, Partition(run.run_id, epoch)).state().weights


def test_an_epoch_takes_the_next_pairs_encoded_once_and_learns_which_is_preferred(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Of six pairs, the second epoch of four takes the last two and then the first."""
    config = config_of(
        tiny_model, tmp_path, write_pairs(tmp_path / "pairs" / "a.parquet", range(6))
    )
    run = start_run(config, "r")
    run_epochs(run, 2)
    policy = load_policy(config)
    for epoch, expected in enumerate([[0, 1, 2, 3], [4, 5, 0, 1]]):
        rows, latents = [], []
        for shard in range(2):
            loaded = ROLLOUTS.require(run.store, Partition("r", epoch, shard))
            rows += loaded.rows()
            latents.append(loaded.trajectories()["latents"])
            assert set(loaded.trajectories()) == {"latents"}
        assert [row.prompt for row in rows] == [f"prompt {n}" for n in expected for _ in "ab"]
        assert [row.prompt_metadata["pair"] for row in rows] == [n for n in expected for _ in "ab"]
        images = [decode_image(row.image_png) for row in rows]
        gray = [np.unique(np.asarray(image)).tolist() for image in images]
        assert gray == [[value] for n in expected for value in (n, 200 - n)]
        again = torch.cat([policy.encode_images([image]) for image in images])
        torch.testing.assert_close(torch.cat(latents)[:, 0], again, atol=1e-4, rtol=1e-4)
        assert {row.policy_digest for row in rows} == {run.pins.preferences}
        reward_id = run.reward_id
        scores = [
            SCORES.require(run.store, Partition("r", epoch, shard, reward_id)) for shard in range(2)
        ]
        assert [row.reward for each in scores for row in each.rows()] == [1.0, 0.0] * 4
        credit = ADVANTAGES.require(run.store, Partition("r", epoch, reward_id=reward_id)).rows()
        assert [(row.columns["pair"], row.columns["preferred"]) for row in credit] == [
            (n, side) for n in range(4) for side in (1, 0)
        ]
    assert any(
        not torch.equal(value, weights(run, 2)[name]) for name, value in weights(run, 1).items()
    )
    assert not verify_run(run.store, "r").damages
    last = CHECKPOINT.require(run.store, Partition("r", 2))
    assert last.document("metrics")["sampling_forwards"] == 0  # nothing was sampled
    write_dataset(History(run), tmp_path / "dataset")
    card = (tmp_path / "dataset" / "README.md").read_text()
    assert "preference pairs that people made" in card and "synthetic" not in card


def test_doctor_looks_at_the_pairs(tiny_model: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs" / "a.parquet", range(6))
    for path, ready, told in (
        (pairs, True, "6 preference pairs in .*, such as 'prompt 0'"),
        (tmp_path / "nowhere", False, "no Parquet files"),
    ):
        findings = examine(config_of(tiny_model, tmp_path, path))
        (found,) = (each for each in findings if each.part == "preferences")
        assert found.ok is ready and re.search(told, found.message)


def test_a_resumed_run_has_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs" / "a.parquet", range(6))
    straight = start_run(config_of(tiny_model, tmp_path / "one", pairs), "r")
    run_epochs(straight, 2)
    as_in_a_new_process()
    stopped = start_run(config_of(tiny_model, tmp_path / "two", pairs), "r")
    run_epochs(stopped, 1)
    as_in_a_new_process()
    run_epochs(start_run(config_of(tiny_model, tmp_path / "two", pairs), "r"), 2)
    assert content(straight) == content(stopped)


def test_pairs_that_have_changed_are_refused_by_name_and_a_fork_trains_on_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs" / "a.parquet", range(6))
    config = config_of(tiny_model, tmp_path, pairs)
    run_epochs(start_run(config, "r"), 1)
    write_pairs(pairs / "a.parquet", range(1, 7))
    as_in_a_new_process()
    told = r"digests\.preferences: \w+ at the first start, .* have changed\. Restore them"
    with pytest.raises(RunIdentityMismatch, match=told):
        check_run(config, "r")
    with pytest.raises(ConfigError, match=told):
        run_epochs(open_run(start_run(config.changed(seed=1), "s").store, "r"), 2)
    as_in_a_new_process()
    run = open_run(start_run(config.changed(seed=2), "t").store, "r")
    forked = fork_config(run, 1, overrides=["fork.rollouts=0"])
    run_epochs(start_run(forked.changed(epochs=2), "mended"), 2)
    (first, *_) = ROLLOUTS.require(run.store, Partition("mended", 1, 0)).rows()
    assert first.prompt == "prompt 5"


def test_a_fork_trains_on_the_same_pairs_without_reading_them_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    """And on them as another algorithm does; images of people are no policy's samples."""
    pairs = write_pairs(tmp_path / "pairs" / "a.parquet", range(4))
    run = start_run(config_of(tiny_model, tmp_path, pairs), "r")
    run_epochs(run, 1)
    for name, changes in {
        "same": {},
        "awm": {"algorithm": {"type": "awm", "advantages": {"type": "batch"}}},
    }.items():
        as_in_a_new_process()
        fork = start_run(fork_config(run, 0).changed(epochs=1, **changes), name)
        (pairs / "a.parquet").rename(tmp_path / "away")
        try:
            run_epochs(fork, 1)
        finally:
            (tmp_path / "away").rename(pairs / "a.parquet")
        first, other = (
            ROLLOUTS.require(run.store, Partition(run_id, 0, 0)).objects for run_id in ("r", name)
        )
        assert first == other
    assert_same_tensors(weights(run, 1), weights(open_run(run.store, "same"), 1))


def test_a_fork_may_go_from_samples_to_pairs(tiny_model: Path, tmp_path: Path) -> None:
    """A fork of a run that sampled takes its samples first, and then pairs."""
    pairs = write_pairs(tmp_path / "pairs" / "a.parquet", range(8))
    config = config_of(tiny_model, tmp_path, pairs, reward={"name": "jpeg_compressibility"})
    run = start_run(config.changed(preferences=None), "r")
    run_epochs(run, 1)
    as_in_a_new_process()
    fork = start_run(fork_config(run, 0).changed(epochs=2, preferences=config.preferences), "f")
    run_epochs(fork, 2)
    inherited, own = (
        ROLLOUTS.require(run.store, Partition("f", epoch, 0)).samples()[0] for epoch in range(2)
    )
    assert own.policy_digest == fork.pins.preferences != inherited.policy_digest
    assert own.prompt == "prompt 4"  # the epoch's number tells where it begins


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"algorithm": {"type": "ddpo_is"}},
            r"algorithm\.type ddpo_is trains on trajectories, .* set algorithm\.type to dpo",
        ),
        (
            {"rollouts": {"samples_per_prompt": 2, "store_trajectories": "full"}},
            r"no trajectories, and rollouts\.store_trajectories is full; leave it out",
        ),
        (
            {"rollouts": {"samples_per_prompt": 4}},
            r"of a pair are a group, and rollouts\.samples_per_prompt is 4; set it to 2",
        ),
    ],
)
def test_settings_that_do_not_fit_pairs_are_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        config_of(Path("model"), tmp_path, Path("pairs"), **changes)
