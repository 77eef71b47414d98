"""Settings that are text are taken as they are typed, by `--set`, in forms and as `--root`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.errors import ConfigError
from tests.configs import MINIMAL, written

TYPED = [
    "/data/run #1",
    "2025",
    "#1",
    "1e-3",
    "true",
    "a: b",
    "[a]",
    "{a: 1}",
    "@home",
    "%x",
    "& *",
    "- x",
    "it's",
    "C:\\runs",
    "a=b",
    " x ",
    "日本 🎈",
]
SETTINGS = ["storage.root", "outputs", "tracking.experiment", "model.path", "prompts.name"]


def value(config: RunConfig, key: str) -> object:
    found: object = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path, yaml.safe_dump(MINIMAL))


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("key", SETTINGS)
def test_text_is_as_typed(file: Path, key: str, typed: str) -> None:
    assert value(read_config(file, [f"{key}={typed}"]), key) == typed
    assert value(read_config(file, (), {key: typed}), key) == typed


@pytest.mark.parametrize("typed", TYPED)
def test_a_models_path_alone_is_as_typed(file: Path, typed: str) -> None:
    if typed.startswith("{"):
        typed = "x" + typed
    assert read_config(file, [f"model={typed}"]).model.path == typed


def test_a_model_may_be_a_mapping(file: Path) -> None:
    assert read_config(file, ["model={path: x, revision: y}"]).model.revision == "y"


def test_text_in_quotes_is_what_is_inside(file: Path) -> None:
    for typed, expected in (('"2025"', "2025"), ("'/run #1'", "/run #1"), ('"a" b', '"a" b')):
        assert read_config(file, [f"outputs={typed}"]).outputs == expected


@pytest.mark.parametrize("key", ["storage.root", "model.revision", "tracking.parent"])
@pytest.mark.parametrize("typed", ["null", "~", ""])
def test_null_leaves_text_that_may_be_absent_out(file: Path, key: str, typed: str) -> None:
    assert value(read_config(file, [f"{key}={typed}"]), key) is None


def test_a_field_of_a_form_takes_precedence_and_may_stay_empty(file: Path) -> None:
    settings = {"epochs": 3, "seed": None, "storage.root": "", "tracking.uri": None}
    config = read_config(file, ["epochs=9", "storage.root=x", "seed=4"], settings)
    assert (config.epochs, config.seed, config.storage.root) == (3, 4, "x")


def test_parameters_keep_what_yaml_would_take_for_a_comment(file: Path) -> None:
    config = read_config(file, ["prompts.parameters.path=/data/prompts #1.txt"])
    assert config.prompts.parameters == {"path": "/data/prompts #1.txt"}


def test_an_override_that_is_no_yaml_says_so_in_one_line(file: Path) -> None:
    with pytest.raises(ConfigError, match="the value is not valid YAML: line 1") as caught:
        read_config(file, ["sampler.steps=["])
    assert "\n" not in str(caught.value)
