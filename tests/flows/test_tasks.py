"""The tasks' bodies, without Prefect: what they commit, and what they refuse or find done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.states import Failed

from ddpo.algorithms.advantages import PerPromptAdvantages
from ddpo.basics.digests import sha256_bytes
from ddpo.config import StorageConfig
from ddpo.errors import (
    ConfigError,
    CorruptObject,
    PolicyMismatch,
    RetiredObject,
    RewardError,
    RewardUnavailable,
    StoreCallFailed,
    StoreRefused,
    StoreUnavailable,
)
from ddpo.runs import Run, start_run
from ddpo.store import manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Ref
from ddpo.store.tables import decode_advantages, decode_rewards, decode_rollouts
from ddpo.store.upkeep.retention import is_retired
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.pictures import PictureSet, draw_pictures
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.update import update_policy
from ddpo_workflow.tasks.worker import RunHandle, opened
from tests.fold import as_in_a_new_process, run_epoch, run_epochs
from tests.tiny import tiny_config

TREES = (
    "rollouts",
    "trajectories",
    "rewards",
    "advantages",
    "statistics",
    "pictures",
    "checkpoints",
    "manifests",
)
PICTURES = PictureSet(prompts=("a cat",), seeds=(0, 1))


@dataclass(frozen=True)
class Epoch:
    """What the tasks of an epoch returned."""

    pictures: Ref
    rollouts: list[Ref]
    scores: list[Ref]
    advantages: Ref
    following: Ref
    commit: Ref


def a_run(model: Path, root: Path, run_id: str = "r", **changes: Any) -> Run:
    changes.setdefault("storage", {"root": str(root)})
    return start_run(tiny_config(model, **changes), run_id)


def handle_of(run: Run) -> RunHandle:
    return run.handle


def nothing() -> None:
    """What happens between two tasks of one process."""


def do_epoch(
    run: Run,
    checkpoint: Ref,
    epoch: int,
    *,
    between: Callable[[], None] = nothing,
) -> Epoch:
    """Call the tasks of an epoch in turn, with something between each two."""
    handle = handle_of(run)

    def then(ref: Ref) -> Ref:
        between()
        return ref

    pictures = then(draw_pictures.fn(handle, checkpoint, PICTURES, epoch))
    rollouts = [
        then(sample_shard.fn(handle, checkpoint, epoch, s)) for s in range(run.shards_per_epoch)
    ]
    scores = [then(score_shard.fn(handle, ref, epoch, s)) for s, ref in enumerate(rollouts)]
    advantages = then(credit_of.fn(handle, checkpoint, rollouts, scores, epoch))
    following = then(update_policy.fn(handle, checkpoint, rollouts, advantages, epoch))
    commit = then(commit_epoch.fn(handle, rollouts, scores, advantages, following, epoch))
    return Epoch(pictures, rollouts, scores, advantages, following, commit)


def digests_of_all_keys(run: Run) -> dict[str, str]:
    """The sha256 of all that tasks wrote."""
    return {
        key: sha256_bytes(run.store.read(key)) for tree in TREES for key in run.store.list(tree)
    }


@pytest.fixture
def fresh_process() -> None:
    as_in_a_new_process()


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_a_task_whose_manifest_exists_returns_it_and_loads_no_model(
    tiny_model: Path, root: Path, monkeypatch: pytest.MonkeyPatch
):
    run = a_run(tiny_model, root)
    first = start.fn(handle_of(run))
    done = do_epoch(run, first, 0)
    before = digests_of_all_keys(run)
    as_in_a_new_process()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work that is committed was done again")

    monkeypatch.setattr("ddpo_workflow.tasks.worker.Policy", refuse)
    monkeypatch.setattr("ddpo_workflow.tasks.score.score_samples", refuse)
    monkeypatch.setattr("ddpo.store.objects.Store.put", refuse)
    assert start.fn(handle_of(run)) == first
    assert do_epoch(run, first, 0, between=as_in_a_new_process) == done
    assert digests_of_all_keys(run) == before


def test_a_new_process_for_every_task_changes_no_byte(tiny_model: Path, tmp_path: Path):
    stores = []
    for name, between in (("one", nothing), ("many", as_in_a_new_process)):
        as_in_a_new_process()
        run = a_run(tiny_model, tmp_path / name)
        checkpoint = start.fn(handle_of(run))
        between()
        for epoch in range(2):
            checkpoint = do_epoch(run, checkpoint, epoch, between=between).following
        stores.append(digests_of_all_keys(run))
    one, many = stores
    assert len(one) > 40
    assert {key.partition("/")[0] for key in one} == set(TREES)
    assert one == many


def test_an_update_refuses_rollouts_of_another_policy_by_name(tiny_model: Path, root: Path):
    run = a_run(tiny_model, root)
    handle = handle_of(run)
    first = start.fn(handle)
    done = do_epoch(run, first, 0)
    # Epoch 1's update, given the samples that the policy of epoch 0 drew.
    before = digests_of_all_keys(run)
    with pytest.raises(PolicyMismatch, match=r"sample r/00000/00000\d has policy_digest") as told:
        update_policy.fn(handle, done.following, done.rollouts, done.advantages, 1)
    found, expected = (policy_digest(run, ref) for ref in (first, done.following))
    assert found != expected
    assert found in str(told.value)
    assert expected in str(told.value)
    assert digests_of_all_keys(run) == before


def test_tables_are_in_the_order_of_sample_ids_whatever_the_order_of_arrival(
    tiny_model: Path, root: Path
):
    run = a_run(tiny_model, root)
    handle = handle_of(run)
    first = start.fn(handle)
    rollouts, scores = {}, {}
    for shard in (1, 0):
        rollouts[shard] = sample_shard.fn(handle, first, 0, shard)
        scores[shard] = score_shard.fn(handle, rollouts[shard], 0, shard)
    late_first = credit_of.fn(handle, first, [rollouts[0], rollouts[1]], [scores[1], scores[0]], 0)
    ids = [f"r/00000/{index:06}" for index in range(8)]
    for shard in (0, 1):
        expected = ids[4 * shard : 4 * shard + 4]
        drawn = decode_rollouts(data_of(run, rollouts[shard], "rollouts"))
        scored = decode_rewards(data_of(run, scores[shard], "rewards"))
        assert [row.sample_id for row in drawn] == expected
        assert [row.sample_id for row in scored] == expected
        assert all(row.reward is not None and row.status == "ok" for row in scored)
    rows = decode_advantages(data_of(run, late_first, "advantages"))
    assert [row.sample_id for row in rows] == ids


def test_an_epochs_commit_lists_all_that_the_epoch_made(tiny_model: Path, root: Path):
    run = a_run(tiny_model, root)
    done = do_epoch(run, start.fn(handle_of(run)), 0)
    commit = manifests.load(run.store, done.commit)
    assert commit.kind == "epoch"
    assert commit.inputs == {
        "rollouts": [ref.model_dump() for ref in done.rollouts],
        "rewards": [ref.model_dump() for ref in done.scores],
        "advantages": done.advantages.model_dump(),
        "checkpoint": done.following.model_dump(),
    }
    listed = [*done.rollouts, *done.scores, done.advantages, done.following]
    reached = {
        stored.key for ref in listed for stored in manifests.load(run.store, ref).objects.values()
    }
    trees = ("rollouts", "trajectories", "rewards", "advantages", "statistics")
    written = {key for tree in trees for key in run.store.list(tree)}
    assert len(written) == 8
    assert written <= reached
    for ref in listed:
        for stored in manifests.load(run.store, ref).objects.values():
            run.store.get(stored)  # verifies the digest


def test_retention_keeps_the_newest_checkpoints_and_every_manifest(tiny_model: Path, root: Path):
    storage = StorageConfig(root=str(root), keep_newest_checkpoints=1, keep_every_checkpoint=2)
    run = a_run(tiny_model, root, storage=storage.model_dump())
    checkpoint = start.fn(handle_of(run))
    refs = [checkpoint]
    for epoch in range(4):
        refs.append(do_epoch(run, refs[-1], epoch).following)
    kept = [epoch for epoch in range(5) if not is_retired(run.store, "r", epoch)]
    assert kept == [0, 2, 4]
    for epoch, ref in enumerate(refs):
        assert CHECKPOINT.commit_of(run.store, Partition("r", epoch)) is not None
        if epoch in kept:
            assert CHECKPOINT.load(run.store, ref).state().epoch == epoch
        else:
            with pytest.raises(RetiredObject):
                CHECKPOINT.load(run.store, ref).state()


def data_of(run: Run, ref: Ref, role: str) -> bytes:
    return run.store.get(manifests.load(run.store, ref).objects[role])


def policy_digest(run: Run, checkpoint: Ref) -> str:
    return CHECKPOINT.load(run.store, checkpoint).digests["policy_digest"]


def test_pictures_of_a_retired_checkpoint_are_left_out(tiny_model: Path, root: Path):
    """Another picture set may be asked for on resume, of a checkpoint that is gone by then."""
    run = a_run(tiny_model, root, storage={"root": str(root), "keep_newest_checkpoints": 1})
    first = start.fn(handle_of(run))
    do_epoch(run, first, 0)
    as_in_a_new_process()
    other = PictureSet(prompts=("a dog",), seeds=(0,))
    assert draw_pictures.fn(handle_of(run), first, other, 0) is None


def test_fewer_epochs_than_there_are_is_refused_at_the_start(tiny_model: Path, root: Path):
    run = a_run(tiny_model, root)
    done = do_epoch(run, start.fn(handle_of(run)), 0)
    do_epoch(run, done.following, 1)
    with pytest.raises(ConfigError, match="epochs is 1, but run 'r' has already committed 2"):
        a_run(tiny_model, root, epochs=1)
    assert a_run(tiny_model, root, epochs=2)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StoreCallFailed("write", "a", "s3://b", "SlowDown", "Wait"), True),
        (StoreUnavailable("write", "a", "s3://b", "SlowDown", "Wait"), False),
        (StoreRefused("write", "a", "s3://b", "Forbidden", "Check"), False),
        (RewardError("it raised"), True),
        (RewardUnavailable("the service is away"), False),
        (CorruptObject("a", "0" * 64, "1" * 64), False),
        (ConfigError("no such thing"), False),
        (ValueError("who knows"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_pass_by_itself_is_not_tried_again(error: Exception, again: bool):
    worth = STORAGE["retry_condition_fn"]
    assert worth(None, None, Failed(data=error)) is again


CANNOT_READ_CATS = """
def score(images, prompts):
    if any(prompt.text == "a cat" for prompt in prompts):
        raise ValueError("cats are beyond me")
    return [float(index) for index, _ in enumerate(images)]
"""


@pytest.mark.parametrize(
    ("on_failure", "status"), [("drop", {"ok", "dropped"}), ("impute", {"ok", "imputed"})]
)
def test_samples_that_cannot_be_scored_are_told_apart_and_never_stop_the_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str, status: set
):
    run, scored, following = run_that_cannot_read_cats(
        tiny_model, tmp_path, monkeypatch, on_failure, statistics={"a cat": (1.0, 2.0)}
    )
    rewards = [row for ref in scored.scores for row in decode_rewards(data_of(run, ref, "rewards"))]
    cats = {row.sample_id for row in rewards if row.reward is None}
    assert 0 < len(cats) < len(rewards)
    assert all("cats are beyond me" in row.status for row in rewards if row.sample_id in cats)
    rows = decode_advantages(data_of(run, scored.advantages, "advantages"))
    assert {row.status for row in rows} == status
    assert {row.sample_id for row in rows if row.status != "ok"} == cats
    assert following


def test_a_shard_with_a_sample_that_cannot_be_scored_fails_where_the_config_wants_that(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(RewardError, match=r"in 2 tries, the first r/00000/00000\d: .*beyond me"):
        run_that_cannot_read_cats(tiny_model, tmp_path, monkeypatch, "fail")


def run_that_cannot_read_cats(
    model: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_failure: str,
    statistics: dict[str, tuple[float, ...]] | None = None,
) -> tuple[Run, Epoch, Ref]:
    """Do an epoch of cats and dogs with a reward that raises on cats."""
    (folder / "cannot_read_cats.py").write_text(CANNOT_READ_CATS)
    monkeypatch.syspath_prepend(folder)
    if statistics:
        right = PerPromptAdvantages.compute
        monkeypatch.setattr(
            PerPromptAdvantages, "compute", lambda self, scored, _: right(self, scored, statistics)
        )
    run = a_run(
        model,
        folder / "store",
        reward={"name": "cannot_read_cats:score", "on_failure": on_failure},
        prompts={"name": "prompt_list", "parameters": {"prompts": ["a cat", "a dog"]}},
    )
    done = do_epoch(run, start.fn(handle_of(run)), 0)
    return run, done, done.following


def test_an_off_policy_fork_is_checked_again_once_it_draws_itself(tiny_model: Path, root: Path):
    as_in_a_new_process()
    storage = {"storage": {"root": str(root)}}
    run_epochs(start_run(tiny_config(tiny_model, **storage), "parent"), 1)
    branch = {"run_id": "parent", "epoch": 0, "off_policy": True}
    run = start_run(tiny_config(tiny_model, **storage, fork=branch), "branch")
    handle = RunHandle(root=run.store.root, run_id=run.run_id)
    first = start.fn(handle)
    second = run_epoch(run, first, 0)
    drawn = [
        sample_shard.fn(handle, first, 1, shard) for shard in range(run.shards_per_epoch)
    ]  # by another
    scores = [score_shard.fn(handle, ref, 1, shard) for shard, ref in enumerate(drawn)]
    advantages = credit_of.fn(handle, second, drawn, scores, 1)
    with pytest.raises(PolicyMismatch, match="comes from another policy"):
        update_policy.fn(handle, second, drawn, advantages, 1)


def test_a_later_start_operates_a_run_in_a_process_that_knows_an_earlier_one(
    tiny_model: Path, root: Path
):
    first = a_run(tiny_model, root)
    assert opened(first.handle).config.storage.keep_newest_checkpoints is None
    kept = {"root": str(root), "keep_newest_checkpoints": 1}
    second = a_run(tiny_model, root, storage=kept)
    assert (first.handle.start, second.handle.start) == (1, 2)
    assert opened(second.handle).config.storage.keep_newest_checkpoints == 1
    assert opened(first.handle).config.storage.keep_newest_checkpoints is None
