"""What a reward reports beside its scores, in the form in which it is stored."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import numbers
import re
from collections.abc import Collection, Mapping
from typing import Any

Cell = float | int | str | None
"""A value of a column; None where there is none."""

RESERVED_COLUMNS = frozenset(
    {"sample_id", "reward", "status", "reward_name", "run_id", "epoch", "pictures_name"}
)
"""Columns and partition keys of the stored reward table, which a reward's columns cannot have."""

_LONGEST_NAME = 100
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9_./:-]")
_INT64 = range(-(2**63), 2**63)
_FLOAT32_MAX = float.fromhex("0x1.fffffep+127")

_logger = logging.getLogger(__name__)


def storable(columns: Mapping[Any, Any], count: int) -> dict[str, list[Cell]]:
    """Return columns as they can be stored; a column that cannot be is left out, with a warning.

    A column holds texts, or whole numbers (booleans among them, as 0 and 1), or numbers. A number
    that is not finite as float32 becomes None, as in JSON. Characters that a name cannot have
    become '_', and a name that is taken gets one at its end.

    Args:
        columns: Sequences, arrays or tensors of plain values, by name.
        count: The number of samples, B.

    Returns:
        Columns of B values each, by name.
    """
    found: dict[str, list[Cell]] = {}
    taken = set(RESERVED_COLUMNS)
    for given, values in columns.items():
        try:
            column = _column(values, count)
        except Exception as error:  # of a user's own types
            say_left_out(str(given), str(error))
            continue
        name = _free_name(str(given), taken)
        taken.add(name.lower())  # SQL does not distinguish case
        found[name] = column
    return found


def _column(given: Any, count: int) -> list[Cell]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Collection):
        raise TypeError(f"it is a {type(given).__name__}, not one value per sample")
    to_list = getattr(given, "tolist", None)  # of arrays, and of tensors on whatever device
    values = [_plain(value) for value in (to_list() if to_list else given)]
    if len(values) != count:
        raise ValueError(f"it has {len(values)} values for {count} samples")
    kinds = {type(value) for value in values if value is not None}
    if str in kinds and len(kinds) > 1:
        raise TypeError("it has both text and numbers")
    wide = any(isinstance(value, int) and value not in _INT64 for value in values)
    return [_number(value) for value in values] if wide or float in kinds else values


def _plain(value: Any) -> Cell:
    """Return a value as plain Python; a number of NumPy or torch as Python's."""
    if not isinstance(value, str) and hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, str):  # a lone surrogate has no UTF-8
        return str(value).encode("utf-8", "backslashreplace").decode()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"it has values of type {type(value).__name__}, not numbers or text")


def _number(value: Cell) -> float | None:
    if value is None or isinstance(value, str):
        return None
    try:
        number = float(value)
    except OverflowError:  # of a whole number
        return None
    return number if math.isfinite(number) and abs(number) <= _FLOAT32_MAX else None


def _free_name(given: str, taken: set[str]) -> str:
    """Return a name that a stored column can have, as close as possible to the given one."""
    plain = _OTHER_CHARACTERS.sub("_", given)
    plain = plain if re.match(r"[A-Za-z_]", plain) else f"_{plain}"
    ends = itertools.chain(["", "_"], (f"_{number}" for number in itertools.count(2)))
    names = (plain[: _LONGEST_NAME - len(end)] + end for end in ends)
    return next(name for name in names if name.lower() not in taken)


@functools.lru_cache(maxsize=256)  # once, not for each shard
def say_left_out(name: str, reason: str) -> None:
    """Warn that a column is not stored.

    Args:
        name: The column.
        reason: Why.
    """
    _logger.warning("the reward's column %r is not stored: %s", name, reason)
