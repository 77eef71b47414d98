"""`rollouts.sample_ahead`: an epoch is sampled before the one before it is trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ddpo.config import RunConfig
from ddpo.errors import ConfigError, PolicyMismatch
from ddpo.runs import Run, open_run, start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, ROLLOUTS
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo.store.upkeep.verify import verify_run
from ddpo_workflow.flows.fork import fork
from ddpo_workflow.flows.train import resume, train
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.repair import repair
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.tracker import tracker
from ddpo_workflow.tasks.update import update_policy
from tests.night import Place
from tests.tiny import tiny_config

EPOCHS = 3
RUN = "ahead"
DRAWN_BY = (0, 0, 1)
"""The checkpoint that draws each epoch."""


def config_in(model: Path | str, folder: Path, **changes: Any) -> RunConfig:
    parts: dict[str, Any] = {
        "sampler": {"steps": 2},
        "rollouts": {"samples_per_epoch": 4, "shard_size": 2, "sample_ahead": True},
        "numerics": {"sample_batch_size": 2, "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-2},
        "storage": {"root": str(folder / "store")},
        "tracking": {
            "uri": f"sqlite:///{folder}/mlflow.db",
            "pictures": {"prompts": ["a cat"], "seeds": [0]},
        },
        "outputs": str(folder / "outputs"),
        "epochs": EPOCHS,
    }
    return tiny_config(model, **(parts | changes))


def trained(model: Path, database: Path, folder: Path, **changes: Any) -> Place:
    """Train a run of three epochs, or fewer, by the flow."""
    folder.mkdir(parents=True)
    shutil.copy(database, folder / "mlflow.db")
    tracker.cache_clear()
    config = config_in(model, folder, **changes)
    file = folder / "config.yaml"
    file.write_text(config.model_dump_json())
    train(str(file), run_id=RUN)
    return Place(Store.open(str(folder / "store")), config.tracking.uri)


@pytest.fixture(scope="module")
def ahead(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    return trained(tiny_model, mlflow_database, tmp_path_factory.mktemp("run") / "ahead")


def drawn(place: Place, run_id: str, epoch: int) -> set[str]:
    """Return the policies that an epoch's samples come from."""
    shards = ROLLOUTS.find_all(place.store, run_id, epoch)
    rows = [row for ref in shards for row in ROLLOUTS.load(place.store, ref).samples()]
    return {row.policy_digest for row in rows}


def weights_of(place: Place, run_id: str, epoch: int) -> str:
    checkpoint = CHECKPOINT.require(place.store, Partition(run_id, epoch))
    return checkpoint.digests["policy_digest"]


@pytest.mark.slow
def test_each_epoch_comes_from_the_weights_before_the_last_one(ahead: Place) -> None:
    weights = [weights_of(ahead, RUN, epoch) for epoch in range(EPOCHS + 1)]
    assert len(set(weights)) == EPOCHS + 1
    for epoch, by in enumerate(DRAWN_BY):
        assert drawn(ahead, RUN, epoch) == {weights[by]}, epoch
    # Nothing is drawn for an epoch that is not planned.
    assert not ROLLOUTS.find_all(ahead.store, RUN, EPOCHS)


@pytest.mark.slow
def test_ratios_are_relative_to_the_policy_that_sampled(ahead: Place) -> None:
    deviations = [
        CHECKPOINT.require(ahead.store, Partition(RUN, epoch + 1)).metrics
        for epoch in range(EPOCHS)
    ]
    assert [metrics["recomputed_log_probs"] for metrics in deviations] == [False] * EPOCHS
    first, *others = (metrics["initial_ratio_deviation"]["max"] for metrics in deviations)
    assert first == 0.0
    assert min(others) > 1e-4  # what one epoch has taught


def in_turn(run: Run, epochs: int) -> Ref:
    """Run the epochs one task after another, each sampled when it is its turn."""
    handle = run.handle
    checkpoints = [start.fn(handle)]
    for epoch in range(epochs):
        drawing = checkpoints[DRAWN_BY[epoch]]
        rollouts = [sample_shard.fn(handle, drawing, epoch, shard) for shard in (0, 1)]
        scores = [score_shard.fn(handle, ref, epoch, shard) for shard, ref in enumerate(rollouts)]
        credit = credit_of.fn(handle, checkpoints[-1], rollouts, scores, epoch)
        checkpoints.append(update_policy.fn(handle, checkpoints[-1], rollouts, credit, epoch))
    return checkpoints[-1]


@pytest.mark.slow
def test_the_order_of_the_tasks_changes_no_byte(
    ahead: Place, tiny_model: Path, tmp_path: Path
) -> None:
    run = start_run(config_in(tiny_model, tmp_path), RUN)
    last = in_turn(run, EPOCHS)
    assert CHECKPOINT.load(run.store, last).digests["policy_digest"] == weights_of(
        ahead, RUN, EPOCHS
    )


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(
    ahead: Place, tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    engine = {"type": "processes", "workers": 2}
    place = trained(tiny_model, mlflow_database, tmp_path / "processes", engine=engine)
    for epoch in range(EPOCHS + 1):
        assert weights_of(place, RUN, epoch) == weights_of(ahead, RUN, epoch), epoch


@pytest.mark.slow
def test_a_run_that_is_extended_ends_as_one_that_was_planned_so(
    ahead: Place, tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    """Retention has to spare the weights that the next epoch is drawn with."""
    storage = {"root": str(tmp_path / "short" / "store"), "keep_newest_checkpoints": 1}
    place = trained(tiny_model, mlflow_database, tmp_path / "short", epochs=1, storage=storage)
    resume(RUN, storage=place.store.root, epochs=EPOCHS)
    for epoch in range(EPOCHS + 1):
        assert weights_of(place, RUN, epoch) == weights_of(ahead, RUN, epoch), epoch


@pytest.mark.slow
def test_its_forks(ahead: Place) -> None:
    root = ahead.store.root
    fork(RUN, 1, fork_id="again", storage=root)
    for epoch in (2, EPOCHS):
        assert weights_of(ahead, "again", epoch) == weights_of(ahead, RUN, epoch), epoch
    in_time = ["rollouts.sample_ahead=false"]
    with pytest.raises(
        PolicyMismatch, match=r"sampled by checkpoint 1, .* of checkpoint 2, .*sample_ahead differs"
    ):
        fork(RUN, 2, fork_id="in-time", overrides=in_time, storage=root)
    fork(RUN, 2, fork_id="off", overrides=[*in_time, "fork.off_policy=true"], storage=root)
    assert weights_of(ahead, "off", EPOCHS) == weights_of(ahead, RUN, EPOCHS)
    # Its first samples of its own come from the checkpoint that it starts from, twice.
    fork(RUN, 1, fork_id="own", overrides=["fork.rollouts=0"], storage=root)
    assert drawn(ahead, "own", 1) == drawn(ahead, "own", 2) == {weights_of(ahead, RUN, 1)}


@pytest.mark.slow
def test_a_lost_shard_is_drawn_again_by_the_checkpoint_that_drew_it(ahead: Place) -> None:
    run = open_run(ahead.store, RUN)
    key = ROLLOUTS.key(Partition(RUN, 2, 1))
    before = run.store.read(key)
    run.store.delete(key)
    damages = verify_run(run.store, RUN).damages
    outcomes = repair(run, damages)
    assert [(outcome.manifest, outcome.done) for outcome in outcomes] == [(key, True)]
    assert run.store.read(key) == before


@pytest.mark.slow
def test_samples_of_the_newest_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    run = start_run(config_in(tiny_model, tmp_path), RUN)
    checkpoint = in_turn(run, 1)
    handle = run.handle
    rollouts = [sample_shard.fn(handle, checkpoint, 1, shard) for shard in (0, 1)]
    scores = [score_shard.fn(handle, ref, 1, shard) for shard, ref in enumerate(rollouts)]
    credit = credit_of.fn(handle, checkpoint, rollouts, scores, 1)
    with pytest.raises(PolicyMismatch, match="another policy"):
        update_policy.fn(handle, checkpoint, rollouts, credit, 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"algorithm": {"type": "ddpo_sf", "updates_per_epoch": 1}},
            r"ddpo_sf with rollouts\.sample_ahead: the estimator",
        ),
        ({"algorithm": {"old_log_probs": "recompute"}}, r"recompute with rollouts\.sample_ahead"),
        ({"algorithm": {"clip": "kl_mask"}}, r"`clip: kl_mask` with rollouts\.sample_ahead"),
        (
            {
                "algorithm": {"type": "dpo", "updates_per_epoch": 1},
                "preferences": {"path": "pairs"},
            },
            "with preferences, the run draws no samples",
        ),
    ],
    ids=["ddpo_sf", "recompute", "kl_mask", "preferences"],
)
def test_what_contradicts_it_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_in("starter", tmp_path, **changes)
