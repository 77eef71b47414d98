"""Retention beside forks of several epochs: real runs in a real store, by the tasks' own bodies."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpo.algorithms.advantages import PerPromptAdvantages
from ddpo.basics.digests import tensors_digest
from ddpo.config import ForkConfig, RunConfig
from ddpo.errors import ConfigError, PolicyMismatch, RetiredObject
from ddpo.runs import Run, RunHandle, check_run, open_run, start_run
from ddpo.runs.forks.checks import saved_rollouts
from ddpo.runs.forks.plan import fork_config
from ddpo.runs.forks.records import record_fork
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH, ROLLOUTS
from ddpo.store.manifests import Ref
from ddpo.store.upkeep import forks
from ddpo.store.upkeep.epoch_retention import retire_epochs
from ddpo.store.upkeep.retention import retire_checkpoints
from ddpo.store.upkeep.verify import verify_run
from ddpo.training.state import TrainState
from ddpo_workflow.flows.start import first_checkpoint
from ddpo_workflow.flows.train import train_run
from ddpo_workflow.tasks.inherit import inherit_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from tests.fold import as_in_a_new_process, run_epoch, run_epochs
from tests.recorded import start_unchecked
from tests.tiny import tiny_config

ADOPTED = 3
"""Epochs of the history that a fork trains on, of five."""

PER_PROMPT = PerPromptAdvantages(buffer_size=8, min_count=2)

pytestmark = pytest.mark.slow


def config_of(model: Path, root: Path, epochs: int, fork: bool) -> RunConfig:
    branch = {"run_id": "history", "epoch": 0, "rollouts": ADOPTED, "off_policy": True}
    return tiny_config(
        model,
        sampler={"steps": 2},
        rollouts={"samples_per_epoch": 4, "shard_size": 2},
        numerics={"sample_batch_size": 2, "micro_batch_size": 2},
        storage={"root": str(root)},
        epochs=epochs,
        **({"fork": branch} if fork else {}),
    )


@pytest.fixture
def history(tiny_model: Path, tmp_path: Path) -> Run:
    """A run of five epochs that keeps everything so far."""
    as_in_a_new_process()
    run = start_run(config_of(tiny_model, tmp_path / "store", 5, fork=False), "history")
    run_epochs(run, 5)
    return run


def forked(history: Run, model: Path) -> Run:
    root = Path(history.store.root.removeprefix("file://"))
    run = start_run(config_of(model, root, ADOPTED + 1, fork=True), "fork")
    record_fork(run)
    return run


def adopted(run: Run) -> set[str]:
    """Keys of all that the rollouts of a fork's adopted epochs consist of."""
    return {
        stored.key
        for epoch in range(ADOPTED)
        for shard in range(run.shards_per_epoch)
        if (found := ROLLOUTS.commit_of(run.store, Partition(run.run_id, epoch, shard)))
        for stored in found.manifest.objects.values()
    }


def epoch_of(key: str) -> int:
    parsed = keys.parse_object(key)
    assert parsed is not None
    return parsed[1].epoch


def weights(run: Run) -> str:
    found = CHECKPOINT.commit_of(run.store, Partition(run.run_id, ADOPTED + 1))
    assert found is not None
    return tensors_digest(CHECKPOINT.load(run.store, found.ref).state().weights)


def test_a_fork_keeps_every_epoch_that_it_adopted(history: Run, tiny_model: Path) -> None:
    fork = forked(history, tiny_model)
    run_epochs(fork, ADOPTED + 1)
    own = adopted(fork)
    assert len(own) == ADOPTED * history.shards_per_epoch * 3
    assert all("run_id=history" in key for key in own)
    retired = retire_epochs(fork.store, "history", keep="checkpoints", older_than=1)
    assert retired == [0, 1, 2, 3]
    trees = [ROLLOUTS.data_folder(role, "history") for role in ROLLOUTS.roles]
    left = {key for tree in trees for key in fork.store.list(tree)}
    assert {key for key in left if epoch_of(key) != 4} == own
    verified = verify_run(fork.store, "fork")
    assert not verified.damages and not verified.retired

    # Its resume, which shows an adopted epoch again, is not told that the epoch is retired.
    as_in_a_new_process()
    run_epochs(open_run(fork.store, "fork"), ADOPTED + 1)
    # The command that made it goes on with it too; under another name it would be too late.
    assert fork_config(history, 0).fork == ForkConfig(run_id="history", epoch=0)
    check_run(fork.config, "fork")
    with pytest.raises(RetiredObject):
        check_run(fork.config, "another")


def test_a_fork_that_was_stopped_between_two_epochs_finds_the_others_after_retention(
    history: Run, tiny_model: Path, tmp_path: Path
) -> None:
    fork = forked(history, tiny_model)
    handle = RunHandle(root=fork.store.root, run_id="fork")
    run_epoch(fork, start.fn(handle), 0)
    retire_epochs(fork.store, "history", keep="checkpoints", older_than=1)
    as_in_a_new_process()
    run_epochs(fork, ADOPTED + 1)
    assert len(adopted(fork)) == ADOPTED * fork.shards_per_epoch * 3

    # It ends as it would have without a stop, and without retention.
    as_in_a_new_process()
    root = tmp_path / "undisturbed"
    run_epochs(start_run(config_of(tiny_model, root, 5, fork=False), "history"), 5)
    other = start_run(config_of(tiny_model, root, ADOPTED + 1, fork=True), "fork")
    run_epochs(other, ADOPTED + 1)
    assert weights(fork) == weights(other)


def test_a_fork_that_comes_after_retention_is_told_so(history: Run, tiny_model: Path) -> None:
    retire_epochs(history.store, "history", keep="images_and_scores", older_than=1)
    with pytest.raises(RetiredObject, match="trajectories"):
        forked(history, tiny_model)


def test_a_fork_that_cannot_begin_is_refused_before_its_name_is_taken(history: Run) -> None:
    store = history.store
    changes = {
        "fork": ForkConfig(run_id="history", epoch=1, rollouts=ADOPTED, off_policy=True),
        "algorithm": history.config.algorithm.model_copy(update={"advantages": PER_PROMPT}),
    }
    config = history.config.model_copy(update=changes)
    check_run(config, "fork")

    keep_all = {key: store.read(key) for key in store.list()}

    def retired(part: str, epoch: int) -> None:
        for key in set(store.list()) - set(keep_all):
            store.delete(key)
        commit = EPOCH.commit_of(store, Partition("history", epoch))
        assert commit is not None
        record = keys.retired_key(part, "history", epoch)
        inputs = {"epoch": commit.ref.model_dump()}
        manifests.commit(store, record, kind=f"retired-{part}", inputs=inputs, objects={})

    # Of three adopted epochs the last two, which a fork comes to hours later.
    for part, epoch in (("samples", 2), ("trajectories", 3)):
        retired(part, epoch)
        with pytest.raises(RetiredObject, match=f"{part} of epoch {epoch}"):
            check_run(config, "fork")
    # What its prompt statistics would be rebuilt from; pictures alone are enough for that.
    retired("trajectories", 0)
    check_run(config, "fork")
    retired("samples", 0)
    with pytest.raises(ConfigError, match=r"epoch 0 of 'history'.*--reset-statistics"):
        check_run(config, "fork")
    reset = ForkConfig(run_id="history", epoch=1, statistics="reset")
    forgetful = config.model_copy(update={"fork": reset})
    check_run(forgetful, "fork")
    assert retire_checkpoints(store, "history", keep_newest=1, keep_every=None)[:2] == [0, 1]
    with pytest.raises(RetiredObject, match="checkpoints"):
        check_run(forgetful, "fork")
    assert not store.exists(keys.run_key("fork"))


def test_an_epoch_that_a_run_adopted_off_policy_starts_no_on_policy_fork(
    history: Run, tiny_model: Path
) -> None:
    root = Path(history.store.root.removeprefix("file://"))
    config = config_of(tiny_model, root, ADOPTED + 1, fork=True)
    faster = config.optimizer.model_copy(update={"learning_rate": 1e-2})
    parent = start_run(config.model_copy(update={"optimizer": faster}), "fork")
    run_epochs(parent, ADOPTED + 1)
    with pytest.raises(PolicyMismatch, match=r"epoch 1 of run 'fork'.*'history'.*off_policy: true"):
        check_run(fork_config(parent, 1), "second")
    assert not parent.store.exists(keys.run_key("second"))
    off = fork_config(parent, 1, overrides=["fork.off_policy=true"])
    check_run(off, "second")
    # Of its first epoch, and of what it drew itself, its own checkpoint is the policy.
    for epoch in (0, ADOPTED):
        check_run(fork_config(parent, epoch), "second")


def test_a_checkpoint_that_never_was_is_missed_before_a_name_is_taken(history: Run) -> None:
    """A comparison's shared run has its first alone."""
    config = fork_config(history, 1)
    history.store.delete(CHECKPOINT.key(Partition("history", 1)))
    with pytest.raises(ConfigError, match="has no checkpoint 1"):
        check_run(config, "fork")


def test_a_fork_is_told_what_retention_deletes_while_it_adopts_it(
    history: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where retention looked for forks before this one left its record."""
    root = Path(history.store.root.removeprefix("file://"))
    fork = start_run(config_of(tiny_model, root, ADOPTED + 1, fork=True), "fork")
    handle = RunHandle(root=fork.store.root, run_id="fork")

    read_state = Checkpoint.state

    def overtaken_state(checkpoint: Checkpoint) -> TrainState:
        state = read_state(checkpoint)
        retired = retire_checkpoints(fork.store, "history", keep_newest=1, keep_every=None)
        assert 0 in retired
        return state

    def overtaken_rollouts(run: Run, epoch: int) -> list[Ref]:
        saved = saved_rollouts(run, epoch)
        assert 0 in retire_epochs(run.store, "history", keep="images_and_scores", older_than=1)
        return saved

    monkeypatch.setattr(Checkpoint, "state", overtaken_state)
    with pytest.raises(RetiredObject, match="checkpoint"):
        start.fn(handle)
    monkeypatch.setattr("ddpo_workflow.tasks.inherit.saved_rollouts", overtaken_rollouts)
    with pytest.raises(RetiredObject, match="trajectories"):
        inherit_shard(fork, 0, 0)


def test_a_fork_that_was_killed_before_it_left_its_record_leaves_it_as_it_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention would not know of it, however far it gets."""

    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    root = tmp_path / "store"
    start_run(config_of(tiny_model, root, 5, fork=False), "history")
    fork = start_unchecked(config_of(tiny_model, root, ADOPTED + 1, fork=True), "fork")
    assert fork.store.list(keys.forks_prefix("history")) == []
    monkeypatch.setattr("ddpo_workflow.flows.train.picture_set", stop)
    with pytest.raises(Stopped):
        train_run(open_run(fork.store, "fork"))
    assert [name for name, _ in forks.recorded(fork.store, "history")] == ["fork"]


def test_a_fork_that_has_its_statistics_does_not_ask_for_the_epochs_before_it_again(
    history: Run,
) -> None:
    changes = {
        "fork": ForkConfig(run_id="history", epoch=2),
        "algorithm": history.config.algorithm.model_copy(update={"advantages": PER_PROMPT}),
    }
    fork = start_run(history.config.model_copy(update=changes), "fork")
    record_fork(fork)
    handle = RunHandle(root=fork.store.root, run_id="fork")
    of_history = handle.model_copy(update={"run_id": "history"})
    scores = [
        score_shard.fn(of_history, rollouts, epoch, shard)
        for epoch in range(2)
        for shard, rollouts in enumerate(saved_rollouts(history, epoch))
    ]
    first = start.fn(handle, scores)
    assert retire_epochs(fork.store, "history", keep="checkpoints", older_than=1) == [0, 1, 3]
    assert first_checkpoint(fork) == first
