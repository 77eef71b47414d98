"""Any value of any setting, however it is given, is refused in one line or stored and read back."""

from __future__ import annotations

import itertools
import json
import math
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from ddpo.basics.digests import canonical_json
from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.config.yaml_text import write_yaml
from ddpo.errors import ConfigError, DdpoError
from ddpo.models.numerics import resolve_numerics
from ddpo.prompts import Prompt
from ddpo.runs import open_run, start_run
from ddpo.runs.readback import check_readable
from ddpo.store import runs
from ddpo.store.objects import Store
from tests.configs import MINIMAL

TEXT = st.text(max_size=12) | st.sampled_from(
    ["~", "null", "1e-3", "on", "010", "0x1f", "1:30", "# x", "a #b", "2025-01-01", "<<", "=", "'"]
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 5e-324, 1e308, 2**63, 10**30])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def accepts_anything(
    images: Sequence[Image.Image], prompts: Sequence[Prompt], value: Any = None
) -> list[float]:
    """Reward = 0, with a parameter that may be anything."""
    return [0.0] * len(images)


def keys_of(part: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting and of every part."""
    for name, field in part.model_fields.items():
        yield above + name
        for kind in {field.annotation, *get_args(field.annotation)} - {NoneType}:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind, f"{above}{name}.")


KEYS = [*keys_of(RunConfig), "reward.parameters.value", "prompts.parameters.value", "sampler.type"]
_count = itertools.count()


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return a config with one setting, as YAML would have it."""
    raw: dict[str, Any] = json.loads(json.dumps({**MINIMAL, "model": {"path": "starter"}}))
    *parents, last = key.split(".")
    part = raw
    for parent in parents:
        part = part.setdefault(parent, {})
    part[last] = value
    return raw


def assert_clear(error: DdpoError) -> None:
    """Assert that a message has a line for each problem, after one for the whole."""
    first, *rest = str(error).split("\n")
    for line in (first, *rest):
        assert line.isprintable() and 0 < len(line) < 1000, line
    assert all(line.startswith("  ") for line in rest)


def stored(config: RunConfig) -> RunConfig:
    """Return a config as a store gives it back, by the steps of a start."""
    store, run_id = Store.open("memory://any-value"), f"r{uuid.uuid4().hex}"
    numerics = resolve_numerics(config.numerics)
    identity: dict[str, Any] = {
        **config.identity(),
        "digests": {"reward_id": "r-00000000", "reward": "0"},
    }
    check_readable(store, run_id, config, numerics, identity)
    runs.create_or_check_run(
        store, run_id, identity=identity, numerics=numerics.model_dump(mode="json"), code={}
    )
    runs.append_operation(store, run_id, config.operation())
    return open_run(store, run_id).config


def check(file: Path, overrides: Sequence[str], key: str, value: Any) -> None:
    try:
        config = read_config(file, overrides)
        # Names a device that may be absent.
        found = stored(config.changed(numerics=config.numerics.changed(device="cpu")))
    except ConfigError as error:
        assert_clear(error)
        return
    assert found.identity() == config.identity()
    assert found.operation() == config.operation()
    if ".parameters." in key:
        part: Any = found
        for name in key.split("."):
            part = part[name] if isinstance(part, dict) else getattr(part, name)
        assert canonical_json(part) == canonical_json(value)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(KEYS), JSON)
@example("optimizer.max_grad_norm", math.inf)
@example("reward.parameters.value", [math.nan])
@example("sampler.type", [1])
@example("model.path", "\ud800")
@example("epochs", 10**400)
def test_a_value_in_yaml(tmp_path: Path, key: str, value: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(nested(key, value)), encoding="utf-8", errors="surrogatepass")
    check(file, (), key, value)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(KEYS), JSON)
def test_a_value_by_set(tmp_path: Path, key: str, value: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(MINIMAL))
    check(file, [f"{key}={write_yaml(value).removesuffix('...' + chr(10)).strip()}"], key, value)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["outputs", "tracking.experiment", "model.path", "prompts.name"]), TEXT)
def test_text_by_set_is_as_typed(tmp_path: Path, key: str, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(MINIMAL))
    try:
        config = stored(read_config(file, [f"{key}={text}"]))
    except ConfigError as error:
        assert_clear(error)
        return
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    quoted = text[:1] in ("'", '"') and text[-1:] == text[:1]
    assert found == text or quoted


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=60))
@example("[" * 3000)
@example("&a [*a]")
@example("{model: &a {path: *a}}")
@example("model: starter\nmodel: other")
def test_any_document_is_read_or_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert_clear(caught.value)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(JSON)
def test_a_parameter_goes_through_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    reward = {"name": f"{__name__}:accepts_anything", "parameters": {"value": value}}
    raw = {**MINIMAL, "reward": reward, "storage": {"root": "memory://starts"}}
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(raw), encoding="utf-8", errors="surrogatepass")
    run_id = f"r{next(_count)}"
    store = Store.open("memory://starts")
    try:
        run = start_run(read_config(file), run_id)
    except ConfigError as error:
        assert_clear(error)
        assert run_id not in runs.list_runs(store)
        return
    found = open_run(store, run_id).config
    assert found == run.config
    assert canonical_json(found.reward.parameters) == canonical_json({"value": value})
