"""A fork asks its reward about adopted samples only where the same reward has not answered yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpo.errors import DdpoError
from ddpo.runs import Run, RunHandle, start_run
from ddpo.store import manifests
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from tests.fold import as_in_a_new_process, run_epochs
from tests.tiny import tiny_config

SMALL = {"sampler": {"steps": 2}, "rollouts": {"samples_per_epoch": 4, "shard_size": 4}}


class AskedError(DdpoError):
    """The reward was asked."""


def a_run(model: Path, root: Path, run_id: str, reward: str, fork: dict[str, object] | None) -> Run:
    changes = {"storage": {"root": str(root)}, "reward": {"name": reward}, **SMALL}
    return start_run(tiny_config(model, **changes, fork=fork), run_id)


def test_scores_of_the_same_reward_are_taken_over_and_another_reward_is_asked(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    as_in_a_new_process()
    parent = a_run(tiny_model, tmp_path, "parent", "jpeg_compressibility", None)
    run_epochs(parent, 1)

    def asked(*_: object, **__: object) -> None:
        raise AskedError

    monkeypatch.setattr("ddpo_workflow.tasks.score.score_samples", asked)
    branch: dict[str, object] = {"run_id": "parent", "epoch": 0}
    for reward in ("jpeg_compressibility", "jpeg_incompressibility"):
        run = a_run(tiny_model, tmp_path, f"by-{reward}", reward, branch)
        handle = RunHandle(root=run.store.root, run_id=run.run_id)
        rollouts = sample_shard.fn(handle, start.fn(handle), 0, 0)
        if reward == parent.config.reward.name:
            taken = manifests.load(run.store, score_shard.fn(handle, rollouts, 0, 0))
            # Its own object: retention of the parent's epoch cannot take it away.
            assert f"/run_id={run.run_id}/" in taken.objects["rewards"].key
        else:
            with pytest.raises(AskedError):
                score_shard.fn(handle, rollouts, 0, 0)
