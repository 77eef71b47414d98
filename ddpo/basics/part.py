"""What every part of a config is built on."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Frozen; refuses keys that it does not know, and shows no values in its errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


def is_off(value: Any) -> bool:
    """Tell whether an option is off: None or 0.

    Such options are left out of what a config says of itself (``exclude_if``). So a config that
    does not use an option has the same identity, and a run the same bytes, as before there was one.
    """
    return value is None or value == 0


def is_auto(value: Any) -> bool:
    """Tell whether a setting is left to what the rest of the config needs, likewise."""
    return value == "auto"
