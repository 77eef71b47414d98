"""YAML as configs are written in: version 1.2's core schema, and no key twice.

PyYAML itself reads version 1.1, in which `1e-3` is text, `no` is false, `1:30` is 90 and `010` is
8; of duplicate keys it keeps the last.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml import SafeDumper, SafeLoader, ScalarNode
from yaml.constructor import ConstructorError

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_PLAIN = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
)
"""What text without quotes stands for: a tag, its form, and how it may begin."""
_MOST_DIGITS = 1000


class _Loader(SafeLoader):
    """Makes lists, mappings, text, numbers, bools and None; any other tag is refused."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012  # filled below, in place of PyYAML's own
    yaml_constructors: Any = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping and refuse duplicate keys; `<<` is merged in later."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (first := lines.get((key.tag, key.value))) is not None:
                where = f"line {line}" if first == line else f"lines {first} and {line}"
                raise ConstructorError(
                    problem=f"the key {key.value!r} occurs twice, in {where}; keep one of them"
                )
            lines[key.tag, key.value] = line
        return node


class _Dumper(SafeDumper):
    """Quotes text that version 1.1 or 1.2 would read as something else."""


def _whole(loader: SafeLoader, node: Any) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    if len(text) > _MOST_DIGITS:
        raise ConstructorError(
            problem=f"found a number of {len(text)} digits", problem_mark=node.start_mark
        )
    return int(text if base == 10 else text[2:], base)


for _kind, _form, _first in _PLAIN:
    _Loader.add_implicit_resolver(_TAG + _kind, _form, _first)
    if _kind in ("int", "float"):
        _Dumper.add_implicit_resolver(_TAG + _kind, _form, _first)
for _kind in ("null", "bool", "float", "str", "seq", "map"):
    _Loader.add_constructor(_TAG + _kind, getattr(SafeLoader, f"construct_yaml_{_kind}"))
_Loader.add_constructor(_TAG + "int", _whole)
_Loader.yaml_constructors[None] = SafeLoader.construct_undefined  # of all other tags


def read_yaml(text: str) -> Any:
    """Read a document.

    Args:
        text: The document.

    Returns:
        Lists, mappings, text, numbers, bools and None.

    Raises:
        ValueError: It is no such document; one line that says where.
    """
    return _read(text)[1]


def read_typed(text: str) -> Any:
    """Read a value that was typed into a command or a form: text stays as it was typed.

    In a document, ` #` begins a comment; here it is a part of the text. What YAML reads as
    something other than text, or as text in quotes, is read as YAML.

    Args:
        text: The value.

    Raises:
        ValueError: It is not valid YAML.
    """
    node, value = _read(text)
    if node is None and text.strip():
        return text
    if isinstance(node, ScalarNode) and node.style is None:
        whole = node.end_mark.index >= len(text.rstrip())
        return value if whole and not isinstance(value, str) else text
    return value


def unquoted(text: str) -> str:
    """Return text as it was typed, or what is inside the quotes around all of it.

    Args:
        text: The text, quoted as in YAML or not at all.
    """
    if text[:1] not in ('"', "'"):
        return text
    try:
        node, value = _read(text)
    except ValueError:
        return text
    whole = isinstance(node, ScalarNode) and node.end_mark.index == len(text)
    return value if whole else text


def write_yaml(value: Any) -> str:
    """Return the document that `read_yaml`, or any other reader, reads as this value.

    Args:
        value: Lists, mappings, text, numbers, bools and None; keys keep their order.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _read(text: str) -> tuple[yaml.Node | None, Any]:
    """Return a document's root and its value."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(_in_one_line(error)) from None
    except RecursionError:
        raise ValueError("lists and mappings are nested too deep") from None
    except KeyError as error:  # of an explicit tag, such as `!!bool x`
        raise ValueError(f"{error} is not a value of its tag") from None
    finally:
        if loader is not None:
            loader.dispose()


def _in_one_line(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the document's text, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + ", ".join(part for part in (error.context, error.problem) if part)
