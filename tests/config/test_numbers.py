"""Numbers that no computer, no file or no reader can hold are refused, wherever they stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from ddpo.algorithms import ALGORITHMS
from ddpo.algorithms.advantages import ADVANTAGES
from ddpo.basics.part import Part
from ddpo.config import SAMPLERS, FullConfig, LoraConfig, RunConfig
from ddpo.config.files import parse_comparison, parse_config, parse_reward, read_config
from ddpo.errors import ConfigError
from tests.configs import MINIMAL, parse, written

NOT_FINITE = (".inf", "-.inf", ".nan")


def annotations(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return set().union(*map(annotations, inner)) if inner else {annotation}


def float_settings(
    part: type[BaseModel], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield the keys of the settings that are floats, and whether they are a list of floats."""
    for name, field in part.model_fields.items():
        kinds = annotations(field.annotation) - {NoneType, type(None)}
        if float in kinds:
            yield (*above, name), "tuple" in str(field.annotation)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Part):
                yield from float_settings(kind, (*above, name))


def cases() -> list[tuple[dict[str, Any], str]]:
    """Return what a config has around a float, as its key is told in a message, and its place."""
    found: list[tuple[str, dict[str, Any], bool]] = []
    for key, many in float_settings(RunConfig):
        if key[0] not in ("algorithm", "trainable", "sampler"):
            found.append((".".join(key), {}, many))
    unions = (
        ("algorithm", ALGORITHMS),
        ("trainable", (LoraConfig, FullConfig)),
        ("sampler", SAMPLERS),
    )
    for section, kinds in unions:
        for kind in kinds:
            (tag,) = get_args(kind.model_fields["type"].annotation)
            for key, many in float_settings(kind):
                if key[0] != "advantages":
                    found.append((".".join((section, *key)), {section: {"type": tag}}, many))
    for kind in ADVANTAGES:
        (tag,) = get_args(kind.model_fields["type"].annotation)
        around = {"algorithm": {"type": "ddpo_is", "advantages": {"type": tag}}}
        for key, many in float_settings(kind):
            found.append((".".join(("algorithm", "advantages", *key)), around, many))
    return [(around, f"{name}={'[{0}, {0}]' if many else '{0}'}") for name, around, many in found]


CASES = cases()


def test_there_are_such_settings() -> None:
    assert len(CASES) >= 15
    assert "optimizer.max_grad_norm={0}" in [setting for _, setting in CASES]


@pytest.mark.parametrize("number", [*NOT_FINITE, "1e400"])
@pytest.mark.parametrize(("around", "setting"), CASES, ids=[setting for _, setting in CASES])
def test_a_number_that_is_not_finite_is_refused(
    tmp_path: Path, around: dict[str, Any], setting: str, number: str
) -> None:
    file = written(tmp_path, yaml.safe_dump({**MINIMAL, **around}))
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{key}.*: found -?(inf|nan); input should be a finite"):
        read_config(file, [setting.format(number)])


@pytest.mark.parametrize("number", ["1e39", "-1e39", "1e-39"])
@pytest.mark.parametrize(("around", "setting"), CASES, ids=[setting for _, setting in CASES])
def test_a_number_that_torch_cannot_hold_is_refused(
    tmp_path: Path, around: dict[str, Any], setting: str, number: str
) -> None:
    file = written(tmp_path, yaml.safe_dump({**MINIMAL, **around}))
    with pytest.raises(ConfigError, match=r"does not fit into float32|should be|cannot be"):
        read_config(file, [setting.format(number)])


@pytest.mark.parametrize("value", [float("inf"), [float("nan")], {"deep": [-float("inf")]}])
def test_parameters_hold_finite_numbers(value: Any) -> None:
    named = {"name": "jpeg_compressibility", "parameters": {"scale": value}}
    for part in ("reward", "prompts"):
        with pytest.raises(ConfigError, match=rf"{part}.parameters: scale.* is not a JSON number"):
            parse(**{part: named})
    with pytest.raises(ConfigError, match="is not a JSON number; use a finite one, or null"):
        parse_reward(named, "reward 'jpeg_compressibility'")


def test_a_comparison_holds_finite_numbers() -> None:
    raw = {"base": MINIMAL, "variants": {"a": {}, "b": {"optimizer": {"x": float("inf")}}}}
    with pytest.raises(ConfigError, match=r"variants.b: optimizer.x: inf is not a JSON number"):
        parse_comparison(raw, "compare.yaml")


def test_null_turns_clipping_off_and_is_remembered() -> None:
    config = parse(optimizer={"max_grad_norm": None})
    assert config.optimizer.max_grad_norm is None
    identity: dict[str, Any] = config.identity()
    assert identity["optimizer"]["max_grad_norm"] is None
    assert parse_config(identity, "run.json") == config


def test_a_changed_part_is_checked_like_a_written_one() -> None:
    config = parse()
    assert config.optimizer.changed(learning_rate=0.5).learning_rate == 0.5
    assert config.changed(epochs=3).epochs == 3
    with pytest.raises(ValueError, match="greater than 0"):
        config.changed(epochs=0)
    with pytest.raises(ValueError, match="does not divide"):
        config.changed(rollouts=config.rollouts.changed(shard_size=3))


def test_nothing_is_copied_without_being_checked() -> None:
    """`model_copy(update=...)` and `model_construct` take any value."""
    root = Path(__file__).parents[2]
    files = [
        file for folder in ("ddpo", "tasks", "flows") for file in (root / folder).rglob("*.py")
    ]
    assert not [
        str(file)
        for file in files
        if "model_copy(" in file.read_text() or "model_construct(" in file.read_text()
    ]
