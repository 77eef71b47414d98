"""Values and problems of validation, in one line of a message."""

from __future__ import annotations

import reprlib

from pydantic import ValidationError

_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = 120


def shown(value: object) -> str:
    """Return a value's `repr`, cut where it is long or nested."""
    return _repr.repr(value)


def shown_key(key: object) -> str:
    """Return a key as it is written, or its `repr` if that is long or cannot be printed."""
    text = str(key)
    return text if text.isprintable() and len(text) <= _repr.maxother else shown(key)


def in_one_line(error: ValidationError) -> str:
    """Return what is wrong with which key, without the values."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(shown_key, item["loc"])), item["msg"])))
        for item in error.errors(include_url=False, include_input=False)
    )
