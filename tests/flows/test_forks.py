"""Fork and rescore: what is saved, under another reward. By the flows, with Prefect's server."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from ddpo.config import RunConfig
from ddpo.digests import tensors_digest
from ddpo.errors import ConfigError, NotInHistory, PolicyMismatch, UnknownSchema
from ddpo.history import open_run as open_history
from ddpo.lineage import forks_of
from ddpo.prompts import Prompt
from ddpo.report import reward_curve
from ddpo.rewards import Scores
from ddpo.run import Run, open_run
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import find_checkpoint, load_checkpoint, load_document
from ddpo.store.epoch_retention import retire_epochs
from ddpo.store.images import decode_image
from ddpo.store.objects import Store
from ddpo.store.tables import decode_advantages, decode_rollouts
from flows import cli
from flows.fork import fork, forked_config
from flows.rescore import chosen_epochs, rescore
from flows.train import train
from tasks.mlflow_connection import RUN_ID_TAG
from tests.tiny import build_tiny_model, tiny_config

EPOCHS = 3
NIGHT = "night"
_DEAR = "jpeg_incompressibility"


_UNREADABLE: set[bytes] = set()


def picky(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
    """Reward = the first pixel's red; of pictures that are named, none."""
    return Scores(
        values=np.array([image.tobytes()[0] for image in images], dtype=np.float32),
        failed=np.array([image.tobytes() in _UNREADABLE for image in images]),
    )


@dataclass(frozen=True)
class Place:
    """A store with a run of three epochs, and the MLflow database that shows it."""

    store: Store
    uri: str

    def run(self, run_id: str) -> Run:
        return open_run(self.store, run_id)

    def page(self, run_id: str) -> Any:
        client = MlflowClient(self.uri)
        experiments = [e.experiment_id for e in client.search_experiments()]
        (found,) = client.search_runs(
            experiments, filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'"
        )
        return found

    def weights(self, run_id: str, epoch: int) -> str:
        found = find_checkpoint(self.store, run_id, epoch)
        assert found is not None
        return tensors_digest(load_checkpoint(self.store, found.ref).weights)


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Type a `ddpo` command, which ends well."""
    monkeypatch.setattr("sys.argv", ["ddpo", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.fixture(scope="module")
def place(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    folder = tmp_path_factory.mktemp("forks")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    config: RunConfig = tiny_config(
        tiny_model,
        prompts={"name": "prompt_list", "parameters": {"prompts": ["a cat", "a dog"]}},
        sampler={"steps": 2, "samples_per_epoch": 8, "shard_size": 4},
        advantages={"type": "per_prompt", "buffer_size": 16, "min_count": 4},
        optimizer={"learning_rate": 1e-2},
        storage={"root": str(folder / "store")},
        tracking={
            "uri": f"sqlite:///{folder}/mlflow.db",
            "pictures": {"prompts": ["a cat"], "seeds": [0]},
        },
        outputs=str(folder / "outputs"),
        epochs=EPOCHS,
    )
    file = folder / "config.yaml"
    file.write_text(config.model_dump_json())
    train(str(file), run_id=NIGHT)
    return Place(Store.open(str(folder / "store")), config.tracking.uri)


@pytest.mark.slow
def test_a_fork_with_the_same_reward_ends_in_the_very_weights_of_its_run(place: Place) -> None:
    fork(NIGHT, 1, fork_id="again", storage=place.store.root)
    for epoch in range(1, EPOCHS + 1):
        assert place.weights("again", epoch) == place.weights(NIGHT, epoch), epoch
    # Prompt statistics were rebuilt from the scores of epoch 0.
    for epoch in (1, EPOCHS):
        ours, theirs = (
            load_document(place.store, found.manifest, "progress")
            for run_id in ("again", NIGHT)
            if (found := find_checkpoint(place.store, run_id, epoch))
        )
        assert ours == theirs
    assert theirs["statistics"]
    assert [point.epoch for point in reward_curve(place.run("again"))] == [1, 2]
    # Nothing of epoch 1 was drawn or copied.
    for shard in range(2):
        found = [
            manifests.find(place.store, keys.rollout_manifest_key(run_id, 1, shard))
            for run_id in ("again", NIGHT)
        ]
        assert found[0] and found[1] and found[0].manifest.objects == found[1].manifest.objects
    # Lineage, both ways.
    assert forks_of(place.store, NIGHT) == ["again"]
    assert place.run("again").config.fork.run_id == NIGHT
    tags = place.page("again").data.tags
    assert tags["mlflow.parentRunId"] == place.page(NIGHT).info.run_id
    assert (tags["ddpo.forked_from"], tags["ddpo.forked_at"]) == (NIGHT, "1")


@pytest.mark.slow
def test_a_fork_under_another_reward_scores_what_is_saved_and_goes_on(place: Place) -> None:
    name = fork(NIGHT, 2, "jpeg_incompressibility", storage=place.store.root, epochs=4)
    run = place.run(name)
    assert name.startswith("night-from-2-jpeg_incompressibility-")
    assert [point.epoch for point in reward_curve(run)] == [2, 3]
    own, new = (
        decode_advantages(place.store.get(found.manifest.objects["advantages"]))
        for each in (place.run(NIGHT), run)
        if (
            found := manifests.find(
                place.store,
                keys.advantage_manifest_key(each.reward.identity.reward_id, each.run_id, 2),
            )
        )
    )
    assert [row.reward for row in new] == pytest.approx([-row.reward for row in own])
    # The statistics behind them hold epochs 0 and 1, scored by the new reward: signs turned.
    assert [row.count for row in new] == [row.count for row in own]
    assert [row.advantage for row in new] == pytest.approx([-row.advantage for row in own])
    assert place.weights(name, 3) != place.weights(NIGHT, 3)
    assert place.weights(name, 2) == place.weights(NIGHT, 2)


@pytest.mark.slow
def test_a_fork_may_forget_the_rewards_before_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(
        monkeypatch, "fork", NIGHT, "--epoch", "1", "--reward", "jpeg_incompressibility",
        "--run-id", "reset", "--reset-statistics", "--epochs", "2", "--root", place.store.root,
    )  # fmt: skip
    found = find_checkpoint(place.store, "reset", 1)
    assert found and load_document(place.store, found.manifest, "progress")["statistics"] == {}


@pytest.mark.slow
def test_a_fork_of_one_that_forgot_rewards_forgets_them_too(place: Place) -> None:
    fork(NIGHT, 1, fork_id="forgot", statistics="reset", storage=place.store.root)
    fork("forgot", 2, fork_id="forgot-too", storage=place.store.root)
    assert place.weights("forgot-too", EPOCHS) == place.weights("forgot", EPOCHS)


@pytest.mark.slow
def test_a_rescored_fork_has_the_advantages_of_one_that_had_that_reward_from_the_start(
    place: Place,
) -> None:
    """Its prompt statistics are rebuilt by the new reward, or reset, as its own were."""
    root = place.store.root
    for statistics in ("rebuild", "reset"):
        name, other = f"by-size-{statistics}", f"by-colour-{statistics}"
        fork(NIGHT, 1, fork_id=name, statistics=statistics, epochs=2, storage=root)
        reward_id = rescore(name, "colorfulness", storage=root)
        fork(NIGHT, 1, "colorfulness", fork_id=other, statistics=statistics, epochs=2, storage=root)
        rescored, had = (
            decode_advantages(place.store.get(found.manifest.objects["advantages"]))
            for run_id in (name, other)
            if (
                found := manifests.find(
                    place.store, keys.advantage_manifest_key(reward_id, run_id, 1)
                )
            )
        )
        assert [row.advantage for row in rescored] == [row.advantage for row in had]
        assert [row.count for row in rescored] == [row.count for row in had]
        assert {row.count for row in had} != {0}
    before = {key: place.store.read(key) for key in place.store.list()}
    rescore("by-size-rebuild", "colorfulness", storage=root)
    assert {key: place.store.read(key) for key in place.store.list()} == before


def test_a_fork_of_another_sampler_is_refused_by_name(place: Place) -> None:
    with pytest.raises(PolicyMismatch, match="another sampler"):
        fork(NIGHT, 1, fork_id="other", overrides=["sampler.steps=3"], storage=place.store.root)
    assert not place.store.exists(keys.run_key("other"))  # its name is free


def test_a_fork_of_another_base_model_is_refused_by_name(place: Place, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", seed=5)
    changed = [f"model.path={other}"]
    scored = place.store.list("manifests/rewards")
    with pytest.raises(PolicyMismatch, match=r"another base model .* expected"):
        fork(NIGHT, 1, _DEAR, fork_id="based", overrides=changed, storage=place.store.root)
    assert place.store.list("manifests/rewards") == scored  # and nothing was paid for it
    # Unless its config says so; how far the policies are apart is measured then.
    changed += ["fork.off_policy=true"]
    fork(NIGHT, 1, fork_id="off", epochs=2, overrides=changed, storage=place.store.root)
    metrics = place.page("off").data.metrics
    assert metrics["update/initial_ratio_deviation_max"] > 1e-4
    assert metrics["update/ratio_p05"] < metrics["update/ratio_p95"]


def test_rollouts_of_another_schema_version_are_refused_by_name(
    place: Place, tmp_path: Path
) -> None:
    copied = tmp_path / "store"
    shutil.copytree(place.store.root.removeprefix("file://"), copied)
    store = Store.open(str(copied))
    key = keys.epoch_manifest_key(NIGHT, 1)
    found = manifests.find(store, key)
    assert found is not None
    store.delete(key)
    store.put_if_absent(key, found.manifest.model_copy(update={"schema_version": 2}).to_bytes())
    with pytest.raises(UnknownSchema, match=r"epoch=00001.* schema version 2, .* reads 1"):
        fork(NIGHT, 1, fork_id="newer", storage=store.root)
    with pytest.raises(UnknownSchema, match=r"epoch=00001.* schema version 2, .* reads 1"):
        rescore(NIGHT, "jpeg_incompressibility", epochs="1", storage=store.root)
    assert not store.exists(keys.run_key("newer"))


@pytest.mark.slow
def test_a_fork_may_begin_an_average_of_the_weights_and_end_it(place: Place) -> None:
    root = place.store.root
    fork(NIGHT, 1, fork_id="averaged", overrides=["optimizer.ema_decay=0.5"], storage=root)
    # It begins at the weights that it starts from, and trains the same ones.
    first, last = (find_checkpoint(place.store, "averaged", epoch) for epoch in (1, EPOCHS))
    assert first and first.manifest.objects["ema"] == first.manifest.objects["weights"]
    assert place.weights("averaged", EPOCHS) == place.weights(NIGHT, EPOCHS)
    assert last and last.manifest.objects["ema"] != last.manifest.objects["weights"]
    fork("averaged", 2, fork_id="plain", overrides=["optimizer.ema_decay=null"], storage=root)
    plain = find_checkpoint(place.store, "plain", EPOCHS)
    assert plain and "ema" not in plain.manifest.objects
    assert place.weights("plain", EPOCHS) == place.weights(NIGHT, EPOCHS)


@pytest.mark.slow
def test_a_history_is_trained_on_off_policy_where_the_config_says_so(place: Place) -> None:
    settings = ["fork.rollouts=2", "fork.off_policy=true", "optimizer.learning_rate=5e-3"]
    fork(NIGHT, 1, fork_id="history", overrides=settings, storage=place.store.root)
    for epoch in (1, 2):
        found = [
            manifests.find(place.store, keys.rollout_manifest_key(run_id, epoch, 0))
            for run_id in ("history", NIGHT)
        ]
        assert found[0] and found[1] and found[0].manifest.objects == found[1].manifest.objects
    # By epoch 2 the fork has learnt otherwise than its parent had.
    assert place.weights("history", 2) != place.weights(NIGHT, 2)
    metrics = place.page("history").data.metrics
    assert metrics["update/initial_ratio_deviation_max"] > 1e-4


def test_what_cannot_be_forked_is_said_before_anything_is_loaded(place: Place) -> None:
    parent = place.run(NIGHT)
    with pytest.raises(ConfigError, match="has not committed epoch 7"):
        forked_config(parent, 7)
    with pytest.raises(ConfigError, match="expected at least 3"):
        forked_config(parent, 2, epochs=2)
    with pytest.raises(ConfigError, match="trainable"):
        forked_config(parent, 1, overrides=["trainable.rank=2", "trainable.type=lora"])
    recomputed = ["fork.off_policy=true", "algorithm.old_log_probs=recompute"]
    with pytest.raises(ConfigError, match="every ratio would be 1"):
        forked_config(parent, 1, overrides=recomputed)
    with pytest.raises(ConfigError, match="off_policy: true"):
        forked_config(parent, 1, overrides=["fork.rollouts=2"])
    with pytest.raises(ConfigError, match="quality belong to a reward, and none is named"):
        forked_config(parent, 1, parameters={"quality": 10})


@pytest.mark.slow
def test_rescoring_is_what_the_run_would_have_had_and_happens_once(place: Place) -> None:
    reward_id = rescore(NIGHT, "jpeg_incompressibility", storage=place.store.root)
    own_id = place.run(NIGHT).reward.identity.reward_id
    for epoch in range(EPOCHS):
        own, new = (
            decode_advantages(place.store.get(found.manifest.objects["advantages"]))
            for each in (own_id, reward_id)
            if (
                found := manifests.find(
                    place.store, keys.advantage_manifest_key(each, NIGHT, epoch)
                )
            )
        )
        assert [row.advantage for row in new] == pytest.approx([-row.advantage for row in own])
        assert [row.count for row in new] == [row.count for row in own]
    page = place.page(f"{NIGHT}-by-{reward_id}")
    assert page.data.tags["mlflow.parentRunId"] == place.page(NIGHT).info.run_id
    metrics = page.data.metrics
    assert metrics["agreement/pearson"] == pytest.approx(-1)
    assert metrics["agreement/spearman"] == pytest.approx(-1)
    client = MlflowClient(place.uri)
    history = client.get_metric_history(page.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [
        (point.epoch, pytest.approx(-point.mean)) for point in reward_curve(place.run(NIGHT))
    ]
    pictures = [f.path for f in client.list_artifacts(page.info.run_id, "images")]
    assert any("disagreement" in name for name in pictures)

    before = {key: place.store.read(key) for key in place.store.list()}
    assert rescore(NIGHT, "jpeg_incompressibility", storage=place.store.root) == reward_id
    assert {key: place.store.read(key) for key in place.store.list()} == before
    assert client.get_metric_history(page.info.run_id, "reward/mean") == history
    assert [f.path for f in client.list_artifacts(page.info.run_id, "images")] == pictures


def brightness(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    """Reward = the mean of all pixels."""
    return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]


@pytest.mark.slow
def test_advantages_of_later_epochs_come_once_those_before_are_scored(place: Place) -> None:
    def known() -> list[tuple[int, bool, bool]]:
        rows = open_history(place.store.root, NIGHT).samples(reward_id).to_pylist()
        found = {(r["epoch"], r["reward"] is not None, r["advantage"] is not None) for r in rows}
        return sorted(found)

    reward = f"{__name__}:brightness"
    reward_id = rescore(NIGHT, reward, epochs="1:", storage=place.store.root)
    assert known() == [(1, True, False), (2, True, False)]
    scored = place.store.list(f"rewards/reward_name={reward_id}")
    rescore(NIGHT, reward, storage=place.store.root)
    assert known() == [(0, True, True), (1, True, True), (2, True, True)]
    assert set(scored) < set(place.store.list(f"rewards/reward_name={reward_id}"))


@pytest.mark.slow
def test_an_epoch_that_cannot_be_scored_ends_no_rescoring(place: Place) -> None:
    for shard in range(2):
        found = manifests.find(place.store, keys.rollout_manifest_key(NIGHT, 1, shard))
        assert found is not None
        rows = decode_rollouts(place.store.get(found.manifest.objects["rollouts"]))
        _UNREADABLE.update(decode_image(row.image_png).tobytes() for row in rows)
    reward_id = rescore(NIGHT, f"{__name__}:picky", storage=place.store.root)
    history = open_history(place.store.root, NIGHT).samples(reward_id)
    by_epoch = {
        epoch: [row for row in history.to_pylist() if row["epoch"] == epoch]
        for epoch in range(EPOCHS)
    }
    assert all(row["advantage"] is not None for row in by_epoch[0])
    assert all((row["reward"], row["advantage"]) == (None, None) for row in by_epoch[1])
    # Prompt statistics after epoch 1 are not known, so that epoch 2 has rewards alone.
    assert all(row["reward"] is not None for row in by_epoch[2])
    assert all(row["advantage"] is None for row in by_epoch[2])


def test_only_epochs_with_saved_samples_are_rescored(place: Place) -> None:
    run = place.run(NIGHT)
    assert chosen_epochs(run, None) == [0, 1, 2]
    assert chosen_epochs(run, "1:") == [1, 2]
    assert chosen_epochs(run, ":1") == [0]
    assert chosen_epochs(run, "0:2") == [0, 1]
    assert chosen_epochs(run, "1") == [1]
    with pytest.raises(NotInHistory, match="committed epochs 0-2"):
        chosen_epochs(run, "5:9")
    with pytest.raises(ConfigError, match="nor a range"):
        chosen_epochs(run, "one")
    with pytest.raises(ConfigError, match="the run's own reward"):
        rescore(NIGHT, "jpeg_compressibility", storage=place.store.root)


@pytest.mark.slow
def test_what_retention_left_is_rescored_and_shown(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kept = Path(
        shutil.copytree(place.store.root.removeprefix("file://"), tmp_path / "store", symlinks=True)
    )
    retire_epochs(Store.open(str(kept)), NIGHT, keep="checkpoints", older_than=2)
    typed(monkeypatch, "rescore", NIGHT, "--reward", "colorfulness", "--root", str(kept))
    screen = capsys.readouterr().out
    shown = [line.split("│")[1].strip() for line in screen.splitlines() if "│" in line]
    assert shown == ["1", "2"]


def test_ranks_of_equal_rewards_are_shared() -> None:
    from tasks.track_rescored import correlations

    some, others = np.array([1.0, 2.0, 2.0, 5.0]), np.array([10.0, 20.0, 30.0, 40.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: by hand, covariance 4.5, variances 4.5 and 5.
    assert correlations(some, others)["agreement/spearman"] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert correlations(some, np.ones(4)) == {}
