"""Reading configs: YAML, overrides, and one clear message for each problem."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ddpo.basics.paths import expand
from ddpo.basics.validation import shown, shown_key
from ddpo.config import CompareConfig, RewardConfig, RunConfig
from ddpo.config.overrides import apply_overrides, apply_settings, models_in
from ddpo.config.yaml_text import read_yaml
from ddpo.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)


def read_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Read a run's config.

    Args:
        path: A YAML file.
        overrides: ``a.b=value``; applied in order.
        settings: Values by dotted key, which take precedence; None leaves the config's own.

    Returns:
        The config, checked as far as possible without loading anything.

    Raises:
        ConfigError: One message that names every problem and its way out.
    """
    raw = read_mapping(path, "`model:`, `prompts:` and `reward:` (see configs/starter.yaml)")
    apply_overrides(raw, overrides)
    apply_settings(raw, settings or {})
    return parse_config(raw, str(Path(path)))


def read_mapping(path: str | Path, expected: str) -> dict[str, Any]:
    """Read a YAML file that holds keys and values.

    Args:
        path: The file.
        expected: Keys that it should have, for the message.

    Returns:
        Its content, unchecked.

    Raises:
        ConfigError: There is no such file, or its content is something else.
    """
    file = Path(expand(str(path)))
    try:
        raw = read_yaml(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        shipped = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        hint = f" The shipped ones: {', '.join(shipped)}." if shipped else ""
        raise ConfigError(f"there is no config file {file}.{hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{file} holds {type(raw).__name__}, not a mapping; expected keys such as {expected}"
        )
    return raw


def parse_config(raw: Mapping[str, Any], source: str) -> RunConfig:
    """Check a config that was read already.

    Args:
        raw: Nested keys and values.
        source: Where it came from, for the message.

    Returns:
        The config.

    Raises:
        ConfigError: One message that names every problem and its way out.
    """
    return _parsed(RunConfig, raw, f"{source} cannot be run")


def parse_reward(raw: Mapping[str, Any], source: str) -> RewardConfig:
    """Check the settings of a reward; its parameters are checked by the reward.

    Args:
        raw: Keys and values.
        source: Where they came from, for the message.

    Returns:
        The settings.

    Raises:
        ConfigError: One message that names every problem and its way out.
    """
    return _parsed(RewardConfig, raw, f"{source} cannot be used")


def parse_comparison(raw: Mapping[str, Any], source: str) -> CompareConfig:
    """Check the content of a comparison's file; the configs of its runs are checked separately.

    Args:
        raw: Nested keys and values.
        source: Where it came from, for the message.

    Returns:
        The comparison's config.

    Raises:
        ConfigError: One message that names every problem and its way out.
    """
    return _parsed(CompareConfig, raw, f"{source} is not a valid comparison")


def _parsed(kind: type[_Model], raw: Mapping[str, Any], refusal: str) -> _Model:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for details in error.errors(include_url=False):
            wrong, hint = _problem(dict(details), kind)
            problems.setdefault(wrong, []).append(hint)
        lines = "".join(f"\n  {wrong}; {' or '.join(hints)}" for wrong, hints in problems.items())
        # Not chained: pydantic's error quotes every value, and one may be a misplaced secret.
        raise ConfigError(f"{refusal}:{lines}") from None


def _problem(error: dict[str, Any], kind_of_config: type[BaseModel]) -> tuple[str, str]:
    """Return what is wrong with which key, and what was expected."""
    path, model, tags, siblings = _walk(error["loc"], kind_of_config)
    name = ".".join(map(shown_key, path)) or "the config"
    kind, found = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = list(model.model_fields) if model else []
        if near := difflib.get_close_matches(path[-1], known, n=1):
            hint = f"did you mean `{near[0]}`?"
        elif parts := _parts_with(model, path[-1]):
            hint = f"it belongs under {' or '.join(parts)}"
        else:
            types = [tag for tag, kind in siblings.items() if path[-1] in kind.model_fields]
            other = f", or type {' or '.join(types)}, which has it" if types else ""
            hint = f"expected one of {', '.join(known)}{other}"
        return f"{name}: there is no such key", hint
    if kind == "missing":
        return f"{name}: missing", "expected a value"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = error["ctx"].get("tag")
        wrong = "missing" if tag is None else f"found {shown(tag)}"
        return f"{name}.type: {wrong}", f"expected one of {', '.join(tags)}"
    if kind == "value_error":
        wrong, _, hint = str(error["ctx"]["error"]).rpartition("; ")
        return (wrong if not path else f"{name}: {wrong}"), hint
    return f"{name}: found {shown(found)}", error["msg"].lower()


def _walk(
    location: Sequence[int | str], root: type[BaseModel]
) -> tuple[list[str], type[BaseModel] | None, list[str], dict[str, type[BaseModel]]]:
    """Follow an error's location, whose names of union members are not keys of the file.

    Returns:
        The dotted path's parts; the model that should have held the last of them; the values that
        `type:` takes inside the last of them, where it is a discriminated union; and by their
        `type:`, all members of the union that the holding model belongs to.
    """
    path: list[str] = []
    owner: type[BaseModel] | None = root
    inside: type[BaseModel] | None = root
    choices: dict[str, type[BaseModel]] = {}
    members: dict[str, type[BaseModel]] = {}
    siblings: dict[str, type[BaseModel]] = {}
    plain_union = False
    for part in map(str, location):
        if part in choices:
            inside, members, choices = choices[part], choices, {}
            continue
        if plain_union:
            plain_union = False
            continue
        owner, siblings, members = inside, members, {}
        path.append(part)
        field = owner.model_fields.get(part) if owner else None
        annotation = field.annotation if field else None
        models = models_in(annotation)
        inside = models[0] if len(models) == 1 else None
        choices = {_tag(model): model for model in models if "type" in model.model_fields}
        plain_union = not models and get_origin(annotation) in (Union, UnionType)
    return path, owner, list(choices), siblings


def _parts_with(model: type[BaseModel] | None, key: str) -> list[str]:
    """Return the parts of a model that have a key which the model itself lacks."""
    fields = model.model_fields.items() if model else ()
    return [
        f"`{name}`"
        for name, field in fields
        if any(key in part.model_fields for part in models_in(field.annotation))
    ]


def _tag(model: type[BaseModel]) -> str:
    """Return the literal that `type:` holds for one member of a discriminated union."""
    (tag,) = get_args(model.model_fields["type"].annotation)
    return tag
