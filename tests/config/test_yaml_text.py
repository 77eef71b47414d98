"""How configs are read as YAML, and how values of a command are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpo.config.files import read_config
from ddpo.config.yaml_text import read_typed, read_yaml, unquoted, write_yaml
from ddpo.errors import ConfigError
from tests.configs import MINIMAL, written

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "optimizer:\n  learning_rate: 0.1\nepochs: 3\noptimizer:\n  epsilon: 1.0e-6\n",
            "'optimizer' occurs twice, in lines 4 and 7",
        ),
        ("sampler:\n  steps: 3\n  eta: 1\n  steps: 4\n", "'steps' occurs twice, in lines 5 and 7"),
        ("sampler: {steps: 3, 'steps': 4}\n", "'steps' occurs twice, in line 4"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(
    tmp_path: Path, content: str, told: str
) -> None:
    file = written(tmp_path, yaml.safe_dump(MINIMAL, default_flow_style=None) + content)
    with pytest.raises(ConfigError, match=told) as caught:
        read_config(file)
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_in_an_override_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match="'steps' occurs twice, in line 1"):
        read_config(file, ["sampler={steps: 3, steps: 4}"])


def test_a_merged_key_may_be_overridden() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a}\n"
    assert read_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-.5e3", -500.0),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("true", True),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2025-01-01", "2025-01-01"),
        ("1_000", "1_000"),
        ("=", "="),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    for read in (read_yaml(f"a: {text}")["a"], read_typed(text)):
        assert read == value
        assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2000,
        "0x" + "f" * 5000,
        "9" * 5000,
        "!!bool x",
        "!!int x",
        "!!binary aGk=",
        "!!set {a, b}",
        "!!python/object/apply:os.system [x]",
        "a: 1\n---\nb: 2",
        "? [a]\n: 1",
        "*x",
        "\x07",
    ],
)
def test_what_is_no_plain_data_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@settings(max_examples=50, deadline=None)
@given(JSON)
def test_what_is_written_is_read_by_every_version(value: Any) -> None:
    text = write_yaml({"a": value})
    for read in (read_yaml(text), yaml.safe_load(text)):
        assert read == {"a": value}
        assert repr(read) == repr({"a": value})


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_text_is_unquoted_or_as_typed(text: str) -> None:
    assert unquoted(f"x{text}") == f"x{text}"
    valid = "".join(each for each in text if not 0xD800 <= ord(each) < 0xE000)
    quoted = yaml.safe_dump(valid, default_style='"', width=10**6).rstrip("\n")
    assert unquoted(quoted) == read_typed(quoted) == valid


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("/data/run #1", "/data/run #1"),
        ("#1", "#1"),
        ("2025 #1", "2025 #1"),
        ("two  spaces ", "two  spaces "),
        ("'quoted # text'", "quoted # text"),
        ("[a, b]", ["a", "b"]),
        ("2025", 2025),
        ("", None),
    ],
)
def test_a_typed_value_has_no_comment(typed: str, value: Any) -> None:
    assert read_typed(typed) == value
