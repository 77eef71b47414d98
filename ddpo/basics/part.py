"""The base of every part of a config."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, field_validator

from ddpo.basics.validation import shown, shown_key

_SMALLEST, _LARGEST = 1.1754944e-38, 3.4028235e38
"""Of the magnitudes that float32 holds in full precision; torch refuses larger ones."""
_WHOLE = 2**63
"""Whole numbers stay below, as in torch, Arrow and databases."""
_DEEPEST = 50
"""Levels of nested lists and mappings that every JSON reader can follow."""


class Part(BaseModel):
    """A frozen model that refuses unknown keys and keeps values out of its error messages.

    It accepts only what a store gives back unchanged, such as finite numbers.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # by default a number that is not finite becomes null
    )

    @field_validator("*", mode="after")
    @classmethod
    def _fits_the_machine(cls, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            _check_number(each)
        return value

    def changed(self, **changes: Any) -> Self:
        """Return the part with other settings, checked as if it had been written that way.

        Args:
            changes: The settings by name.

        Raises:
            ValidationError: They do not fit.
        """
        return type(self).model_validate({**dict(self), **changes})


def is_off(value: Any) -> bool:
    """Return whether an option is off: None or 0.

    Such options are left out of a serialised config (``exclude_if``), so a config that does not
    use an option has the same identity, and a run the same bytes, as before the option existed.
    """
    return value is None or value == 0


def is_on(value: Any) -> bool:
    """Return whether a setting is true, the option's default, for ``exclude_if``."""
    return value is True


def is_unset(value: Any) -> bool:
    """Return whether a number is not given, for ``exclude_if`` where 0 is a choice."""
    return value is None


def is_auto(value: Any) -> bool:
    """Return whether a setting is left to the rest of the config, for ``exclude_if``."""
    return value == "auto"


def is_none(value: Any) -> bool:
    """Return whether a choice is `none`, the option's default, for ``exclude_if``."""
    return value == "none"


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


def _check_number(value: Any) -> None:
    """Refuse what torch cannot compute with, which would fail only in the middle of an epoch."""
    if isinstance(value, float) and value and not _SMALLEST <= abs(value) <= _LARGEST:
        raise ValueError(
            f"{value:g} does not fit into float32; use a number from 1.2e-38 to 3.4e+38 in size"
        )
    _check_whole(value)


def _check_whole(value: Any) -> None:
    if isinstance(value, int) and not -_WHOLE <= value < _WHOLE:
        raise ValueError("the number has more than 64 bits; use one of at most 64")


def _check_json(value: Any, where: str = "", depth: int = 0) -> Any:
    """Return a value that is plain JSON, of a depth that every reader of it can follow.

    Args:
        value: Lists, mappings, text, numbers, bools and None.
        where: Its place, as ``.key[0]``.
        depth: Lists and mappings around it.

    Raises:
        ValueError: Something in it cannot be stored and read back.
    """
    place = f"{where.lstrip('.')}: " if where else ""
    if depth > _DEEPEST:
        raise ValueError(
            f"lists and mappings are nested more than {_DEEPEST} deep; use fewer levels"
        )
    if isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place}{value} is not a JSON number; use a finite one, or null")
    elif isinstance(value, int | None):
        _check_whole(value)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{place}the key {shown(name)} is not text; write it in quotes")
            _check_text(name, place)
            _check_json(item, f"{where}.{shown_key(name)}", depth + 1)
    else:
        kind = type(value).__name__
        raise ValueError(
            f"{place}a {kind} is not JSON; use text, numbers, true, false, null, lists or mappings"
        )
    return value


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{place}{shown(text)} is not valid Unicode: half of a surrogate pair; leave it out"
        ) from None


JsonMapping = Annotated[dict[str, JsonValue], BeforeValidator(_check_json)]
"""Settings that a plug-in checks: anything that JSON can represent."""
