from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from ddpo import config as config_module
from ddpo.config import OPERATION_FIELDS, DdpoSfConfig, FullConfig, RunConfig
from ddpo.config_files import parse_config, read_config
from ddpo.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "configs"
COMPARISONS = sorted(SHIPPED.glob("*_compare.yaml"))
CONFIGS = [file for file in sorted(SHIPPED.glob("*.yaml")) if file not in COMPARISONS]
MINIMAL = {
    "model": "starter",
    "prompts": {"name": "simple_animals"},
    "reward": {"name": "jpeg_compressibility"},
}


def parse(**changes: Any) -> RunConfig:
    return parse_config({**MINIMAL, **changes}, "run.yaml")


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    message = str(caught.value)
    assert message.startswith("run.yaml cannot be run:\n  ")
    return message.removeprefix("run.yaml cannot be run:\n  ")


def written(folder: Path, content: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(content)
    return file


def minimal_file(folder: Path) -> Path:
    return written(folder, yaml.safe_dump(MINIMAL))


# What ships, and the defaults


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_is_read(file: Path) -> None:
    assert read_config(file).epochs > 0


def test_there_are_shipped_configs() -> None:
    assert "starter.yaml" in [file.name for file in CONFIGS]


def test_defaults_are_the_papers() -> None:
    config = parse()
    sampler, optimizer = config.sampler, config.optimizer
    assert (sampler.steps, sampler.eta, sampler.guidance_scale) == (50, 1.0, 5.0)
    assert sampler.samples_per_epoch == 256
    assert config.trainable.model_dump() == {
        "type": "lora",
        "rank": 4,
        "alpha": 4.0,
        "target_modules": ("to_q", "to_k", "to_v", "to_out.0"),
    }
    assert config.algorithm.clip_range == 1e-4
    assert (optimizer.learning_rate, optimizer.betas) == (3e-4, (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.epsilon, optimizer.max_grad_norm) == (1e-4, 1e-8, 1.0)


def all_parts() -> list[type[BaseModel]]:
    return [
        value
        for value in vars(config_module).values()
        if isinstance(value, type)
        and issubclass(value, BaseModel)
        and value.__module__.startswith(config_module.__name__)
        and not value.__name__.startswith("_")
    ]


@pytest.mark.parametrize("part", all_parts(), ids=lambda part: part.__name__)
def test_every_part_and_every_field_says_what_it_is(part: type[BaseModel]) -> None:
    assert part.__doc__
    silent = [
        name
        for name, field in part.model_fields.items()
        if not field.description and name != "type"  # the part's own docstring says it
    ]
    assert not silent
    assert part.model_config.get("frozen") and part.model_config.get("extra") == "forbid"


# Options that came later


def test_options_that_are_off_are_no_part_of_a_runs_identity() -> None:
    """So runs that were started before there were such options go on, in the same bytes."""
    plain: dict[str, Any] = parse().identity()
    assert "window" not in plain["sampler"]
    assert "ema_decay" not in plain["optimizer"]
    assert "kl_weight" not in plain["algorithm"]
    off = {
        "sampler": {"window": None},
        "optimizer": {"ema_decay": None},
        "algorithm": {"type": "ddpo_is", "kl_weight": 0},
    }
    assert parse(**off).identity() == plain
    score_function: dict[str, Any] = parse(algorithm={"type": "ddpo_sf"}).identity()
    assert score_function["algorithm"] == {"type": "ddpo_sf", "updates_per_epoch": 1}


@pytest.mark.parametrize(
    "option",
    [
        {"sampler": {"window": {"steps": 10, "position": 3, "noise_only_there": True}}},
        {"sampler": {"window": {"steps": 10}}},
        {"optimizer": {"ema_decay": 0.99}},
        {"algorithm": {"type": "ddpo_is", "kl_weight": 0.1}},
        {"algorithm": {"type": "ddpo_sf", "kl_weight": 0.1}},
        {"advantages": {"type": "leave_one_out"}},
        {"advantages": {"type": "value", "value_epochs": 3, "value_learning_rate": 0.01}},
    ],
    ids=["window", "random window", "ema", "kl, is", "kl, sf", "leave one out", "value"],
)
def test_options_that_are_on_are_remembered(option: dict[str, Any]) -> None:
    config = parse(**option)
    identity: dict[str, Any] = config.identity()
    ((part, asked),) = option.items()
    assert asked.keys() <= identity[part].keys()
    assert parse_config(identity, "run.json") == config


# What is refused, and how it is said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "epoch: there is no such key; did you mean `epochs`?"),
        (
            {"sampler": {"guidance": 3}},
            "sampler.guidance: there is no such key; did you mean `guidance_scale`?",
        ),
        (
            {"advantages": {"type": "per_prompt", "bufer_size": 8}},
            "advantages.bufer_size: there is no such key; did you mean `buffer_size`?",
        ),
        (
            {"algorithm": {"type": "ddpo_is", "clip_rang": 1e-4}},
            "algorithm.clip_rang: there is no such key; did you mean `clip_range`?",
        ),
        (
            {"trainable": {"type": "lora", "ranks": 8}},
            "trainable.ranks: there is no such key; did you mean `rank`?",
        ),
        (
            {"tracking": {"pictures": {"seed": [1]}}},
            "tracking.pictures.seed: there is no such key; did you mean `seeds`?",
        ),
        (
            {"reward": {"name": "r", "xyzzy": 1}},
            "reward.xyzzy: there is no such key; expected one of name, parameters, tries, "
            "on_failure",
        ),
    ],
)
def test_a_misspelt_key_is_told_the_nearest(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": "many"}, "epochs: found 'many'; input should be a valid integer"),
        ({"sampler": {"steps": 0}}, "sampler.steps: found 0; input should be greater than 0"),
        ({"sampler": {"eta": 1.5}}, "sampler.eta: found 1.5; input should be less than or equal"),
        ({"storage": {"root": 3}}, "storage.root: found 3; input should be a valid string"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1: missing"),
        (
            {"trainable": {"type": "lora", "target_modules": ["to_q", 3]}},
            "trainable.target_modules.1: found 3; input should be a valid string",
        ),
        (
            {"numerics": {"threads": "fast"}},
            "numerics.threads: found 'fast'; input should be a valid integer, unable to parse "
            "string as an integer or input should be 'auto'",
        ),
        (
            {"algorithm": {"type": "ppo"}},
            "algorithm.type: found 'ppo'; expected one of ddpo_is, ddpo_sf, rwr, rwr_sparse",
        ),
        (
            {"advantages": {"clip": 3}},
            "advantages.type: missing; expected one of per_prompt, batch",
        ),
        ({"seed": -1}, "seed: found -1; input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    changes: dict[str, Any], message: str
) -> None:
    assert refusal(**changes).startswith(message)


def test_every_problem_is_named_at_once() -> None:
    lines = refusal(epoch=1, seed="x", sampler={"stepps": 3}).splitlines()
    assert len(lines) == 3


def test_a_missing_part_is_named() -> None:
    with pytest.raises(ConfigError, match="reward: missing"):
        parse_config({"model": "starter", "prompts": {"name": "simple_animals"}}, "run.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler": {"samples_per_epoch": 100, "shard_size": 30}},
            "sampler.shard_size 30 does not divide samples_per_epoch 100; 10, 20, 25, 50 would",
        ),
        (
            {"numerics": {"sample_batch_size": 7}},
            "numerics.sample_batch_size 7 does not divide sampler.shard_size 64; 1, 2, 4, 8 would",
        ),
        (
            {"algorithm": {"type": "ddpo_is", "updates_per_epoch": 3}},
            "algorithm.updates_per_epoch 3 does not divide samples_per_epoch 256; 1, 2, 4, 8 would",
        ),
    ],
)
def test_sizes_that_do_not_divide_say_which_would(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message
    whole, would = (re.findall(r"(\d+)[;]", message)[0], re.findall(r"\d+", message.split(";")[1]))
    assert all(int(whole) % int(each) == 0 for each in would)


def test_a_micro_batch_of_any_size_is_allowed() -> None:
    assert parse(numerics={"micro_batch_size": 7}).numerics.micro_batch_size == 7


def test_ddpo_sf_takes_exactly_one_update() -> None:
    message = refusal(algorithm={"type": "ddpo_sf", "updates_per_epoch": 2})
    assert "algorithm.updates_per_epoch: ddpo_sf takes exactly one update" in message
    assert "no longer the policy's own" in message and "use `type: ddpo_is`" in message
    assert parse(algorithm={"type": "ddpo_sf"}).algorithm == DdpoSfConfig(type="ddpo_sf")


def test_eta_0_is_refused_for_want_of_a_gradient() -> None:
    assert "no gradient; set it above 0" in refusal(sampler={"eta": 0})


RWR = {"type": "rwr"}


def test_regression_has_the_published_settings() -> None:
    dense, sparse = (
        parse(algorithm=RWR).algorithm,
        parse(algorithm={"type": "rwr_sparse"}).algorithm,
    )
    assert (dense.beta, dense.weights_over, dense.inner_epochs) == (0.2, "data_set", 5)
    assert (sparse.keep, sparse.inner_epochs) == (0.1, 50)


def test_regression_needs_no_noise_in_sampling() -> None:
    assert parse(algorithm=RWR, sampler={"eta": 0}).sampler.eta == 0


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"type": "rwr", "updates_per_epoch": 7},
            "algorithm: updates_per_epoch 7 is no multiple of inner_epochs 5, and every pass takes "
            "as many steps; set it to 5 or 10",
        ),
        (
            {"type": "rwr", "updates_per_epoch": 15},
            "algorithm.updates_per_epoch / inner_epochs 5 = 3 does not divide samples_per_epoch "
            "256; 1, 2, 4, 8 would",
        ),
        (
            {"type": "rwr_sparse", "updates_per_epoch": 8},
            "algorithm: updates_per_epoch 8 is no multiple of inner_epochs 50, and every pass "
            "takes as many steps; set it to 50",
        ),
        ({"type": "rwr", "beta": 0}, "algorithm.beta: found 0; input should be greater than 0"),
        (
            {"type": "rwr", "beta": float("inf")},
            "algorithm.beta: found inf; input should be a finite number",
        ),
        (
            {"type": "rwr_sparse", "keep": 1.5},
            "algorithm.keep: found 1.5; input should be less than or equal to 1",
        ),
        (
            {"type": "rwr", "clip_range": 1e-4},
            "algorithm.clip_range: there is no such key; expected one of inner_epochs, "
            "updates_per_epoch, type, beta, weights_over",
        ),
    ],
)
def test_settings_that_regression_cannot_have_are_refused(
    algorithm: dict[str, Any], message: str
) -> None:
    assert refusal(algorithm=algorithm) == message


def test_advantages_are_refused_where_they_would_be_ignored(tmp_path: Path) -> None:
    for advantages in ({"type": "batch"}, {"type": "per_prompt"}):
        message = refusal(algorithm=RWR, advantages=advantages)
        assert message == (
            "advantages do not apply to rwr, which weights samples by its own settings; leave "
            "`advantages` out (`--set advantages=null`)"
        )
    file = written(tmp_path, yaml.safe_dump({**MINIMAL, "advantages": {"type": "batch"}}))
    config = read_config(file, ["algorithm={type: rwr}", "advantages=null"])
    assert config == parse(algorithm=RWR)


def test_only_regression_stores_final_latents_alone() -> None:
    assert parse().stored_trajectories == "full"
    for algorithm in (RWR, {"type": "rwr_sparse"}):
        assert parse(algorithm=algorithm).stored_trajectories == "final"
        full = {"store_trajectories": "full"}
        assert parse(algorithm=algorithm, sampler=full).stored_trajectories == "full"
    message = refusal(sampler={"store_trajectories": "final"})
    assert "ddpo_is trains on every step of a trajectory; leave it at auto" in message


def test_a_regressions_config_survives_its_own_json() -> None:
    """Without the advantages that it does not have: they would be refused when read again."""
    config = parse(algorithm={"type": "rwr_sparse", "keep": 0.25})
    assert "advantages" not in config.identity()
    assert parse_config({**config.identity(), **config.operation()}, "run.json") == config


def test_statistics_that_would_never_be_used_are_refused() -> None:
    message = refusal(advantages={"type": "per_prompt", "buffer_size": 8, "min_count": 9})
    assert "never reached by a buffer of 8" in message and "set min_count to at most 8" in message


# Files and overrides


def test_a_missing_file_names_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS[0].parents[1])
    with pytest.raises(ConfigError, match=r"no config file .*nowhere\.yaml.*configs/starter\.yaml"):
        read_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words", "", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match="not a mapping; expected keys such as `model:`"):
        read_config(written(tmp_path, content))


@pytest.mark.parametrize("content", ["model: [", "a: b: c", "\t- x"])
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_config(written(tmp_path, content))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_config(file)
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_config(tmp_path)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    command = f"!!python/object/apply:os.system ['touch {marker}']"
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_config(written(tmp_path, f"model: {command}\n"))
    assert not marker.exists()


def test_overrides_are_yaml_values_in_order(tmp_path: Path) -> None:
    config = read_config(
        minimal_file(tmp_path),
        [
            "optimizer.learning_rate=1e-4",
            "epochs=3",
            "epochs=4",
            "trainable={type: full}",
            "tracking.pictures.prompts=[a cat, a dog]",
            "tracking.pictures.seeds=[0, 1]",
            "storage.root=s3://bucket/a=b",
            "prompts.parameters.article=false",
        ],
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.epochs == 4
    assert config.trainable == FullConfig(type="full")
    assert config.tracking.pictures.prompts == ("a cat", "a dog")
    assert config.tracking.pictures.seeds == (0, 1)
    assert config.storage.root == "s3://bucket/a=b"
    assert config.prompts.parameters == {"article": False}
    assert config.prompts.name == "simple_animals"


def test_a_models_path_can_be_overridden_in_both_notations(tmp_path: Path) -> None:
    file = minimal_file(tmp_path)
    assert read_config(file, ["model=x"]).model.path == "x"
    assert read_config(file, ["model.path=x"]).model.path == "x"
    config = read_config(file, ["model.revision=abc", "model.resolution=64"])
    assert (config.model.path, config.model.revision, config.model.resolution) == (
        "starter",
        "abc",
        64,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "is no `a.b=value`"),
        ("=3", "is no `a.b=value`"),
        ("epochs=[", "the value is no YAML"),
        ("epochs.more=3", "epochs is 3, which has no parts"),
        ("sampler.step=3", "did you mean `steps`"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config(minimal_file(tmp_path), ["epochs=3", override])


# Identity and operation


def test_a_config_is_identity_operation_and_numerics_and_nothing_twice() -> None:
    config = parse()
    identity, operation = config.identity(), config.operation()
    assert set(operation) == set(OPERATION_FIELDS) == {"epochs", "storage", "tracking", "outputs"}
    assert not set(identity) & set(operation)
    # A run that branches off none says nothing of it.
    assert {*identity, *operation, "numerics", "fork"} == set(RunConfig.model_fields)
    assert "fork" not in identity


def test_operation_changes_no_identity_and_everything_else_does() -> None:
    before = parse().identity()
    operated = parse(epochs=7, storage={"root": "x"}, tracking={"experiment": "y"}, outputs="z")
    assert operated.identity() == before
    for change in (
        {"seed": 1},
        {"model": {"path": "starter", "resolution": 128}},
        {"trainable": {"type": "lora", "rank": 8}},
        {"prompts": {"name": "simple_animals", "parameters": {"article": False}}},
        {"sampler": {"steps": 20}},
        {"reward": {"name": "jpeg_incompressibility"}},
        {"advantages": {"type": "batch"}},
        {"algorithm": {"type": "ddpo_sf"}},
        {"optimizer": {"learning_rate": 1e-4}},
    ):
        assert parse(**change).identity() != before, change


def test_a_config_survives_its_own_json() -> None:
    config = parse(trainable={"type": "full"}, algorithm={"type": "ddpo_sf"})
    whole = {**config.identity(), **config.operation()}
    assert parse_config(whole, "run.json") == config
