"""`fork`: a run from another's checkpoint and saved samples. By the flow, with Prefect's server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ddpo.analysis.report import reward_curve
from ddpo.errors import ConfigError, PolicyMismatch, UnknownSchema
from ddpo.runs import check_run
from ddpo.runs.forks.plan import fork_config
from ddpo.store import keys, manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, EPOCH, ROLLOUTS
from ddpo.store.objects import Store
from ddpo.store.tables import decode_advantages
from ddpo_workflow.flows.fork import fork
from ddpo_workflow.flows.rescore import rescore
from tests.night import EPOCHS, NIGHT, Place, typed
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.slow

_DEAR = "jpeg_incompressibility"


def test_a_fork_with_the_same_reward_ends_in_the_very_weights_of_its_run(place: Place) -> None:
    fork(NIGHT, 1, fork_id="again", storage=place.store.root)
    for epoch in range(1, EPOCHS + 1):
        assert place.weights("again", epoch) == place.weights(NIGHT, epoch), epoch
    # Prompt statistics were rebuilt from the scores of epoch 0.
    for epoch in (1, EPOCHS):
        ours, theirs = (
            CHECKPOINT.read(place.store, found.manifest).document("progress")
            for run_id in ("again", NIGHT)
            if (found := CHECKPOINT.commit_of(place.store, Partition(run_id, epoch)))
        )
        assert ours == theirs
    assert theirs["statistics"]
    assert [point.epoch for point in reward_curve(place.run("again"))] == [1, 2]
    # Nothing of epoch 1 was drawn or copied.
    for shard in range(2):
        found = [
            ROLLOUTS.commit_of(place.store, Partition(run_id, 1, shard))
            for run_id in ("again", NIGHT)
        ]
        assert found[0] and found[1] and found[0].manifest.objects == found[1].manifest.objects
    # Lineage, both ways.
    assert place.store.list(keys.forks_prefix(NIGHT)) == [keys.fork_key(NIGHT, "again")]
    assert place.run("again").config.fork.run_id == NIGHT
    tags = place.page("again").data.tags
    assert tags["mlflow.parentRunId"] == place.page(NIGHT).info.run_id
    assert (tags["ddpo.forked_from"], tags["ddpo.forked_at"]) == (NIGHT, "1")


def test_a_fork_under_another_reward_scores_what_is_saved_and_goes_on(place: Place) -> None:
    name = fork(NIGHT, 2, "jpeg_incompressibility", storage=place.store.root, epochs=4)
    run = place.run(name)
    assert name.startswith("night-from-2-jpeg_incompressibility-")
    assert [point.epoch for point in reward_curve(run)] == [2, 3]
    own, new = (
        decode_advantages(place.store.get(found.manifest.objects["advantages"]))
        for each in (place.run(NIGHT), run)
        if (
            found := ADVANTAGES.commit_of(
                place.store, Partition(each.run_id, 2, reward_id=each.reward.identity.reward_id)
            )
        )
    )
    assert [row.reward for row in new] == pytest.approx([-row.reward for row in own])
    # The statistics behind them hold epochs 0 and 1, scored by the new reward: signs turned.
    assert [row.count for row in new] == [row.count for row in own]
    assert [row.columns["advantage"] for row in new] == pytest.approx(
        [-row.columns["advantage"] for row in own]
    )
    assert place.weights(name, 3) != place.weights(NIGHT, 3)
    assert place.weights(name, 2) == place.weights(NIGHT, 2)


def test_a_fork_may_forget_the_rewards_before_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(
        monkeypatch, "fork", NIGHT, "--epoch", "1", "--reward", "jpeg_incompressibility",
        "--run-id", "reset", "--reset-statistics", "--epochs", "2", "--root", place.store.root,
    )  # fmt: skip
    found = CHECKPOINT.commit_of(place.store, Partition("reset", 1))
    assert (
        found
        and CHECKPOINT.read(place.store, found.manifest).document("progress")["statistics"] == {}
    )


def test_a_fork_of_one_that_forgot_rewards_forgets_them_too(place: Place) -> None:
    fork(NIGHT, 1, fork_id="forgot", statistics="reset", storage=place.store.root)
    fork("forgot", 2, fork_id="forgot-too", storage=place.store.root)
    assert place.weights("forgot-too", EPOCHS) == place.weights("forgot", EPOCHS)


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
    key = EPOCH.key(Partition(NIGHT, 1))
    found = manifests.find(store, key)
    assert found is not None
    store.delete(key)
    store.put_if_absent(key, found.manifest.model_copy(update={"schema_version": 2}).to_bytes())
    with pytest.raises(UnknownSchema, match=r"epoch=00001.* schema version 2, .* reads 1"):
        fork(NIGHT, 1, fork_id="newer", storage=store.root)
    with pytest.raises(UnknownSchema, match=r"epoch=00001.* schema version 2, .* reads 1"):
        rescore(NIGHT, "jpeg_incompressibility", epochs="1", storage=store.root)
    assert not store.exists(keys.run_key("newer"))


def test_a_fork_may_begin_an_average_of_the_weights_and_end_it(place: Place) -> None:
    root = place.store.root
    fork(NIGHT, 1, fork_id="averaged", overrides=["optimizer.ema_decay=0.5"], storage=root)
    # It begins at the weights that it starts from, and trains the same ones.
    first, last = (
        CHECKPOINT.commit_of(place.store, Partition("averaged", epoch)) for epoch in (1, EPOCHS)
    )
    assert first and first.manifest.objects["ema"] == first.manifest.objects["weights"]
    assert place.weights("averaged", EPOCHS) == place.weights(NIGHT, EPOCHS)
    assert last and last.manifest.objects["ema"] != last.manifest.objects["weights"]
    fork("averaged", 2, fork_id="plain", overrides=["optimizer.ema_decay=null"], storage=root)
    plain = CHECKPOINT.commit_of(place.store, Partition("plain", EPOCHS))
    assert plain and "ema" not in plain.manifest.objects
    assert place.weights("plain", EPOCHS) == place.weights(NIGHT, EPOCHS)


def test_a_history_is_trained_on_off_policy_where_the_config_says_so(place: Place) -> None:
    settings = ["fork.rollouts=2", "fork.off_policy=true", "optimizer.learning_rate=5e-3"]
    fork(NIGHT, 1, fork_id="history", overrides=settings, storage=place.store.root)
    for epoch in (1, 2):
        found = [
            ROLLOUTS.commit_of(place.store, Partition(run_id, epoch, 0))
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
        check_run(fork_config(parent, 7, epochs=9), "fork")
    with pytest.raises(ConfigError, match="expected at least 3"):
        fork_config(parent, 2, epochs=2)
    with pytest.raises(ConfigError, match="trainable"):
        trainable = ["trainable.rank=2", "trainable.type=lora"]
        check_run(fork_config(parent, 1, overrides=trainable), "fork")
    recomputed = ["fork.off_policy=true", "algorithm.old_log_probs=recompute"]
    with pytest.raises(ConfigError, match="every ratio would be 1"):
        fork_config(parent, 1, overrides=recomputed)
    with pytest.raises(ConfigError, match="off_policy: true"):
        fork_config(parent, 1, overrides=["fork.rollouts=2"])
    with pytest.raises(ConfigError, match="quality belong to a reward, but no reward is named"):
        fork_config(parent, 1, parameters={"quality": 10})


def test_a_fork_with_samples_of_its_own_ends_in_the_very_weights_of_its_run(place: Place) -> None:
    overrides = ["fork.rollouts=0"]
    fork(NIGHT, 1, fork_id="own", overrides=overrides, storage=place.store.root)
    for epoch in range(1, EPOCHS + 1):
        assert place.weights("own", epoch) == place.weights(NIGHT, epoch), epoch
    drawn = ROLLOUTS.commit_of(place.store, Partition("own", 1, 0))
    assert drawn and all("run_id=own" in each.key for each in drawn.manifest.objects.values())
    # The last checkpoint has no saved samples, and needs none.
    fork(NIGHT, EPOCHS, fork_id="beyond", overrides=overrides, epochs=4, storage=place.store.root)
    assert [point.epoch for point in reward_curve(place.run("beyond"))] == [EPOCHS]


def test_a_fork_with_samples_of_its_own_may_sample_otherwise(place: Place) -> None:
    root = place.store.root
    otherwise = ["fork.rollouts=0", "sampler.steps=3", "seed=5", "rollouts.samples_per_epoch=4"]
    fork(NIGHT, 1, fork_id="otherwise", overrides=otherwise, epochs=2, storage=root)
    assert place.weights("otherwise", 1) == place.weights(NIGHT, 1)
    with pytest.raises(ConfigError, match=r"trainable is .*, but the checkpoint has"):
        trainable = ["fork.rollouts=0", "trainable={type: lora, rank: 2}"]
        fork(NIGHT, 1, fork_id="trained", overrides=trainable, storage=root)
    with pytest.raises(ConfigError, match=r"eight_bit is true, but the checkpoint's .* 32 bits"):
        narrow = ["fork.rollouts=0", "optimizer.eight_bit=true"]
        fork(NIGHT, 1, fork_id="trained", overrides=narrow, storage=root)
    assert not place.store.exists(keys.run_key("trained"))


def test_old_weights_start_at_the_parents_and_are_inherited(place: Place) -> None:
    root = place.store.root
    nft = (
        "algorithm={type: nft, updates_per_epoch: 2, advantages: {type: batch}, "
        "old_decay: {per_step: 0.1, most: 0.9}}"
    )
    fork(NIGHT, 1, fork_id="nft", overrides=[nft], storage=root)
    first, *later = (
        CHECKPOINT.require(place.store, Partition("nft", epoch)) for epoch in (1, 2, EPOCHS)
    )
    assert first.objects["old"] == first.objects["weights"]
    for checkpoint in later:
        assert checkpoint.digests["old_digest"] != checkpoint.digests["policy_digest"]
    # A fork of it inherits them, with samples that they drew.
    fork("nft", 2, fork_id="nft-again", storage=root)
    for epoch in (2, EPOCHS):
        found = [
            CHECKPOINT.require(place.store, Partition(run, epoch)) for run in ("nft", "nft-again")
        ]
        assert found[0].objects["old"].sha256 == found[1].objects["old"].sha256, epoch
        assert place.weights("nft-again", epoch) == place.weights("nft", epoch), epoch
    name = rescore("nft", "jpeg_incompressibility", storage=root)
    assert name.startswith("jpeg_incompressibility-")
    # Samples of old weights are not the trained policy's, which another algorithm would train.
    rwr = ["algorithm={type: rwr, inner_epochs: 1, updates_per_epoch: 2}"]
    with pytest.raises(PolicyMismatch, match=r"sampled with its old weights, .*off_policy: true"):
        fork("nft", 2, fork_id="rwr", overrides=rwr, storage=root)
    fork("nft", 2, fork_id="rwr", overrides=[*rwr, "fork.off_policy=true"], storage=root)
    last = CHECKPOINT.require(place.store, Partition("rwr", EPOCHS))
    assert "old" not in last.objects and "old_digest" not in last.digests
