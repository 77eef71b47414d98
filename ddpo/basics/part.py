"""The base of every part of a config."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A frozen model that refuses unknown keys and keeps values out of its error messages."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


def is_off(value: Any) -> bool:
    """Return whether an option is off: None or 0.

    Such options are left out of a serialised config (``exclude_if``), so a config that does not
    use an option has the same identity, and a run the same bytes, as before the option existed.
    """
    return value is None or value == 0


def is_auto(value: Any) -> bool:
    """Return whether a setting is left to the rest of the config, for ``exclude_if``."""
    return value == "auto"


def is_one(value: Any) -> bool:
    """Return whether a multiplicity is 1, the option's default, for ``exclude_if``."""
    return value == 1


def check_divides(name: str, value: int, of_name: str, whole: int) -> None:
    """Check that one size divides another.

    Args:
        name: The setting that must divide.
        value: Its value.
        of_name: The setting that is divided.
        whole: Its value.

    Raises:
        ValueError: It does not; names the nearest divisors.
    """
    if whole % value == 0:
        return
    divisors = {
        d for i in range(1, math.isqrt(whole) + 1) if whole % i == 0 for d in (i, whole // i)
    }
    nearest = sorted(sorted(divisors, key=lambda d: abs(d - value))[:4])
    raise ValueError(
        f"{name} {value} does not divide {of_name} {whole}; {', '.join(map(str, nearest))} would"
    )
