"""What ships and the defaults, what is part of a run's identity, files and overrides."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from ddpo import config as config_module
from ddpo.algorithms import ALGORITHMS
from ddpo.algorithms.advantages import ADVANTAGES
from ddpo.analysis.comparison.plan import read_comparison
from ddpo.config import OPERATION_FIELDS, FullConfig, RunConfig
from ddpo.config.files import parse_config, read_config
from ddpo.errors import ConfigError
from tests.configs import MINIMAL, parse, written

SHIPPED = Path(__file__).parents[2] / "configs"
COMPARISONS = sorted(SHIPPED.glob("*_compare.yaml"))
CONFIGS = [file for file in sorted(SHIPPED.glob("*.yaml")) if file not in COMPARISONS]


def minimal_file(folder: Path) -> Path:
    return written(folder, yaml.safe_dump(MINIMAL))


# What ships, and the defaults


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: file.name)
def test_every_shipped_comparison_is_read(file: Path) -> None:
    comparison = read_comparison(file)
    assert len(comparison.members) == 5 * (len(comparison.config.variants) + 1)


def test_the_comparison_of_all_algorithms_has_them_all_and_fits_the_flow_starter() -> None:
    flow = (
        "model={path: starter_flow, t5: false, text_tokens: 0}",
        "sampler={type: flow_sde, steps: 5, window: {position: 0, steps: 2}}",
    )
    for overrides in ((), flow):
        comparison = read_comparison(SHIPPED / "starter_all_compare.yaml", overrides=overrides)
        assert {type(m.config.algorithm) for m in comparison.members} == set(ALGORITHMS)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_is_read(file: Path) -> None:
    assert read_config(file).epochs > 0


def test_there_are_shipped_configs() -> None:
    assert "starter.yaml" in [file.name for file in CONFIGS]


def test_defaults_are_the_papers() -> None:
    config = parse()
    sampler, optimizer = config.sampler, config.optimizer
    assert (sampler.steps, sampler.eta, sampler.guidance_scale) == (50, 1.0, 5.0)
    assert config.rollouts.samples_per_epoch == 256
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
    parts = [
        value
        for value in vars(config_module).values()
        if isinstance(value, type)
        and issubclass(value, BaseModel)
        and value.__module__.startswith(config_module.__name__)
        and not value.__name__.startswith("_")
    ]
    return [*parts, *ALGORITHMS, *ADVANTAGES]


def documented_fields(part: type) -> set[str]:
    """Return the fields of a class that have a string under them.

    pydantic could read these itself, but it would whenever a command starts.
    """
    if not part.__module__.startswith("ddpo."):
        return set()
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@pytest.mark.parametrize("part", all_parts(), ids=lambda part: part.__name__)
def test_every_part_and_every_field_says_what_it_is(part: type[BaseModel]) -> None:
    assert part.__doc__
    described = {"type"}.union(*(documented_fields(base) for base in part.__mro__[:-2]))
    assert not part.model_fields.keys() - described  # the part's own docstring says its type
    assert part.model_config.get("frozen") and part.model_config.get("extra") == "forbid"


# Options that came later


def test_options_that_are_off_are_no_part_of_a_runs_identity() -> None:
    """So runs that were started before there were such options go on, in the same bytes."""
    plain: dict[str, Any] = parse().identity()
    assert "window" not in plain["sampler"]
    assert "ema_decay" not in plain["optimizer"]
    assert "kl_weight" not in plain["algorithm"]
    assert (
        plain["rollouts"].keys().isdisjoint({"samples_per_prompt", "shared_start", "sample_ahead"})
    )
    off = {
        "rollouts": {"samples_per_prompt": 1},
        "sampler": {"window": None},
        "optimizer": {"ema_decay": None},
        "algorithm": {"type": "ddpo_is", "kl_weight": 0},
    }
    assert parse(**off).identity() == plain
    score_function: dict[str, Any] = parse(algorithm={"type": "ddpo_sf"}).identity()
    assert score_function["algorithm"] == {
        "type": "ddpo_sf",
        "updates_per_epoch": 1,
        "advantages": plain["algorithm"]["advantages"],
    }


@pytest.mark.parametrize(
    "option",
    [
        {"sampler": {"window": {"steps": 10, "position": 3, "noise_only_there": True}}},
        {"sampler": {"window": {"steps": 10}}},
        {"optimizer": {"ema_decay": 0.99}},
        {"algorithm": {"type": "ddpo_is", "kl_weight": 0.1}},
        {"algorithm": {"type": "ddpo_sf", "kl_weight": 0.1}},
        {"algorithm": {"type": "ddpo_is", "advantages": {"type": "leave_one_out"}}},
        {"algorithm": {"type": "ddpo_sf", "advantages": {"type": "value", "value_epochs": 3}}},
        {"rollouts": {"samples_per_prompt": 4}},
        {"rollouts": {"samples_per_prompt": 4, "shared_start": True}},
        {"rollouts": {"sample_ahead": True}},
    ],
    ids=[
        *("window", "random window", "ema", "kl, is", "kl, sf", "leave one out", "value"),
        *("groups", "shared start", "sample ahead"),
    ],
)
def test_options_that_are_on_are_remembered(option: dict[str, Any]) -> None:
    config = parse(**option)
    identity: dict[str, Any] = config.identity()
    ((part, asked),) = option.items()
    assert asked.keys() <= identity[part].keys()
    assert parse_config(identity, "run.json") == config


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
        ("epochs", "--set expects KEY=VALUE with a dotted key"),
        ("=3", "--set expects KEY=VALUE with a dotted key"),
        ("epochs=[", "the value is not valid YAML"),
        ("epochs.more=3", "epochs is 3, which has no settings"),
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
    # What is off is not written down.
    assert {*operation, "evaluation", "engine"} == set(OPERATION_FIELDS)
    assert not {"evaluation", "engine"} & set(operation)
    assert not set(identity) & set(operation)
    # A run that branches off none says nothing of it.
    unsaid = {"fork", "preferences", "evaluation", "engine"}
    assert {*identity, *operation, "numerics", *unsaid} == set(RunConfig.model_fields)
    assert "fork" not in identity


def test_operation_changes_no_identity_and_everything_else_does() -> None:
    before = parse().identity()
    operated = parse(
        epochs=7,
        engine="processes",
        storage={"root": "x"},
        tracking={"experiment": "y"},
        outputs="z",
        evaluation={},
    )
    assert operated.identity() == before
    for change in (
        {"seed": 1},
        {"model": {"path": "starter", "resolution": 128}},
        {"trainable": {"type": "lora", "rank": 8}},
        {"trainable": {"type": "full", "from_scratch": True}},
        {"prompts": {"name": "simple_animals", "parameters": {"article": False}}},
        {"sampler": {"steps": 20}},
        {"reward": {"name": "jpeg_incompressibility"}},
        {"algorithm": {"type": "ddpo_is", "advantages": {"type": "batch"}}},
        {"rollouts": {"samples_per_prompt": 4}},
        {"algorithm": {"type": "ddpo_sf"}},
        {"optimizer": {"learning_rate": 1e-4}},
    ):
        assert parse(**change).identity() != before, change


def test_a_network_that_is_not_from_scratch_has_the_identity_it_always_had() -> None:
    known = parse(trainable={"type": "full"}).identity()
    assert known["trainable"] == {"type": "full"}
    assert parse(trainable={"type": "full", "from_scratch": False}).identity() == known


def test_a_config_survives_its_own_json() -> None:
    config = parse(trainable={"type": "full"}, algorithm={"type": "ddpo_sf"})
    whole = {**config.identity(), **config.operation()}
    assert parse_config(whole, "run.json") == config
