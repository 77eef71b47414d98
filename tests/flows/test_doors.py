"""Whatever starts a run, it is checked in one place, and a refused run leaves its name free."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddpo.errors import ConfigError, DdpoError, PolicyMismatch, RunNotFound
from ddpo.runs import check_run
from ddpo.runs.forks.plan import fork_config
from ddpo.store import keys
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH, ROLLOUTS
from ddpo.store.objects import Store
from ddpo_workflow.flows.fork import fork
from ddpo_workflow.flows.train import train
from ddpo_workflow.tasks.inherit import inherit_shard
from tests.night import NIGHT, Place, typed
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.slow


def config_file(place: Place, folder: Path, **changes: Any) -> str:
    """Write the config of a run like the night's own, as MLflow's attached config shows it."""
    config = place.run(NIGHT).config
    raw: dict[str, Any] = config.whole()
    for part, value in changes.items():
        raw[part] = {**raw[part], **value} if isinstance(raw.get(part), dict) else value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    return str(file)


def assert_free(place: Place, run_id: str) -> None:
    """Check that there is no such run, and that retention of the night's waits for none."""
    assert not place.store.exists(keys.run_key(run_id))
    assert keys.fork_key(NIGHT, run_id) not in place.store.list(keys.forks_prefix(NIGHT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"shard_size": 2}, "numerics": {"sample_batch_size": 2}}, "shard_size is 2"),
        ({"rollouts": {"samples_per_epoch": 4}}, "samples_per_epoch is 4"),
        ({"trainable": {"type": "lora", "rank": 2}}, "trainable"),
        ({"sampler": {"steps": 3}}, "another sampler"),
        ({"numerics": {"dtype": "bfloat16"}}, "numerics.dtype is bfloat16, expected float32"),
        ({"model": {"resolution": 32}}, "model.resolution is 32x32, expected the model's own"),
        ({"fork": {"epoch": 7}, "epochs": 9}, "has not committed epoch 7|no checkpoint 7"),
        ({"fork": {"run_id": "nigth"}}, "Did you mean night"),
    ],
)
def test_a_fork_section_in_a_config_is_checked_like_the_command(
    place: Place, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    branch = {"run_id": NIGHT, "epoch": 1, **changes.get("fork", {})}
    file = config_file(place, tmp_path, **{**changes, "fork": branch})
    with pytest.raises(DdpoError, match=message):
        train(file, run_id="trained")
    assert_free(place, "trained")


def test_a_fork_section_in_a_config_forks_as_the_command_does(place: Place, tmp_path: Path) -> None:
    file = config_file(place, tmp_path, fork={"run_id": NIGHT, "epoch": 1}, epochs=2)
    assert train(file, run_id="by-config") == "by-config"
    assert place.weights("by-config", 2) == place.weights(NIGHT, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fork.epoch=0", r"fork\.epoch 2, but an override sets it to 0"),
        ("fork.run_id=other", r"fork\.run_id 'night', but an override sets it to 'other'"),
        ("fork=null", r"fork\.run_id 'night', but an override sets it to None"),
        ("storage.root=elsewhere", r"storage\.root .*, but an override sets it to 'elsewhere'"),
    ],
)
def test_an_override_cannot_fork_elsewhere_than_asked(
    place: Place, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fork(NIGHT, 2, fork_id="astray", overrides=[override], storage=place.store.root)
    assert_free(place, "astray")


def test_an_override_that_repeats_what_is_asked_is_no_contradiction(place: Place) -> None:
    parent = place.run(NIGHT)
    assert fork_config(parent, 2, epochs=3, overrides=["fork.epoch=2", "epochs=3"]).epochs == 3
    with pytest.raises(ConfigError, match="epochs 3, but an override sets it to 4"):
        fork_config(parent, 2, epochs=3, overrides=["epochs=4"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["numerics.dtype=bfloat16"], "numerics.dtype is bfloat16, expected float32"),
        (["model.resolution=32"], "model.resolution is 32x32, expected the model's own"),
    ],
)
def test_a_fork_whose_model_samples_otherwise_leaves_its_name_free(
    place: Place, overrides: list[str], message: str
) -> None:
    with pytest.raises(PolicyMismatch, match=message):
        fork(NIGHT, 1, fork_id="otherwise", overrides=overrides, storage=place.store.root)
    assert_free(place, "otherwise")


def test_a_fork_of_another_scheduler_leaves_its_name_free(place: Place, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "v", prediction_type="v_prediction")
    overrides = [f"model.path={other}"]
    with pytest.raises(PolicyMismatch, match="scheduler or size differs: sampler_digest"):
        fork(NIGHT, 1, fork_id="predicting-v", overrides=overrides, storage=place.store.root)
    assert_free(place, "predicting-v")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": {"type": "lora", "target_modules": ["to_x"]}}, "match no layer"),
        ({"model": {"resolution": 17}}, "17 is not a multiple of 2"),
    ],
)
def test_a_model_that_does_not_fit_its_config_leaves_the_name_free(
    place: Place, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = config_file(place, tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        train(file, run_id="unfit")
    assert_free(place, "unfit")


def test_a_damaged_model_leaves_the_name_free(place: Place, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(place.run(NIGHT).config.model.path, model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"truncated")
    file = config_file(place, tmp_path, model={"path": str(model)})
    with pytest.raises(Exception, match=r"(?i)safetensors|header"):
        train(file, run_id="damaged")
    assert_free(place, "damaged")


def test_a_fork_whose_parent_has_yet_to_run_is_checked_when_it_starts(place: Place) -> None:
    """The variants of a comparison are planned before their shared samples are drawn."""
    config = place.run(NIGHT).config
    raw = {"fork": {"run_id": "shared", "epoch": 0}}
    config = type(config).model_validate(config.model_dump() | raw)
    plan = check_run(config, "variant", awaits_parent=True)
    with pytest.raises(RunNotFound, match="no run 'shared'"):
        plan.start()
    assert_free(place, "variant")


def test_adopted_shards_are_counted_again_where_they_are_adopted(
    place: Place, tmp_path: Path
) -> None:
    copied = tmp_path / "store"
    shutil.copytree(place.store.root.removeprefix("file://"), copied)
    store = Store.open(str(copied))
    parent = replace(place.run(NIGHT), store=store)
    plan = check_run(fork_config(parent, 1), "sized")
    small = plan.config.model_copy(
        update={"rollouts": plan.config.rollouts.model_copy(update={"shard_size": 8})}
    )
    digests = plan.identity["digests"]
    run = replace(plan, config=small, identity={**small.identity(), "digests": digests}).start()
    with pytest.raises(ConfigError, match=r"2 shards of 4 samples, .* expects 1 of 8"):
        inherit_shard(run, 1, 0)
    assert not ROLLOUTS.exists(store, Partition("sized", 1, 0))
    assert not EPOCH.exists(store, Partition("sized", 1))


def test_the_command_refuses_before_the_name_is_taken(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        typed(
            monkeypatch, "fork", NIGHT, "--epoch", "1", "--run-id", "typed",
            "--set", "numerics.dtype=bfloat16", "--root", place.store.root,
        )  # fmt: skip
    screen = " ".join(capsys.readouterr().out.split())
    assert "numerics.dtype is bfloat16, expected float32" in screen
    assert "Resume with" not in screen  # there is nothing to resume
    assert_free(place, "typed")
