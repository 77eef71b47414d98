"""Settings of a command or a form, put into a config that was read but not yet checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from ddpo.basics.validation import shown
from ddpo.config import RunConfig
from ddpo.config.yaml_text import read_typed, unquoted
from ddpo.errors import ConfigError


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change settings of an unchecked config, in place.

    Args:
        raw: Nested keys and values.
        overrides: ``a.b=value``, applied in order, so that of one key the last counts. The value of
            a setting that is text is the text as typed, any other is YAML.

    Raises:
        ConfigError: One of them is malformed.
    """
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name.strip():
            raise ConfigError(
                "--set expects KEY=VALUE with a dotted key, such as sampler.steps=20; "
                f"got {override!r}"
            )
        key = name.strip().split(".")
        try:
            value = _value(key, text)
        except ValueError as error:
            raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None
        _put(raw, key, value, f"--set {override!r}")


def apply_settings(raw: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Change settings of an unchecked config, in place, to values that need no reading.

    Args:
        raw: Nested keys and values.
        settings: Values by dotted key; None and empty text leave the config's own.

    Raises:
        ConfigError: The config holds something else where a setting's part should be.
    """
    for name, value in settings.items():
        if value is not None and value != "":
            _put(raw, name.split("."), value, name)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field's annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def _put(raw: dict[str, Any], key: Sequence[str], value: Any, what: str) -> None:
    *parents, last = key
    if parents[:1] == ["model"] and isinstance(raw.get("model"), str):
        raw["model"] = {"path": raw["model"]}
    part = raw
    for depth, parent in enumerate(parents):
        below = part.setdefault(parent, {})
        if not isinstance(below, dict):
            above = ".".join(parents[: depth + 1])
            raise ConfigError(f"{what}: {above} is {shown(below)}, which has no settings")
        part = below
    part[last] = value


def _value(key: Sequence[str], text: str) -> Any:
    """Read the value of a setting.

    Raises:
        ValueError: It is not valid YAML, and the setting is not text.
    """
    if key == ["model"] and not text.lstrip().startswith("{"):
        return unquoted(text)
    kinds = _kinds(key)
    if not kinds or kinds - {str, Path, NoneType}:
        return read_typed(text)
    return None if NoneType in kinds and text in ("", "null", "~") else unquoted(text)


def _kinds(key: Sequence[str]) -> set[Any]:
    """Return the types that a setting may have; none if there is no such setting."""
    owners: list[type[BaseModel]] = [RunConfig]
    fields = []
    for part in key:
        fields = [each.model_fields[part] for each in owners if part in each.model_fields]
        owners = [model for field in fields for model in models_in(field.annotation)]
    kinds = set()
    for field in fields:
        union = get_origin(field.annotation) in (Union, UnionType)
        kinds |= set(get_args(field.annotation)) if union else {field.annotation}
    return kinds
