"""Types of the fields in Prefect's forms: each may stay empty, which leaves it to the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

# Prefect's form shows `str | None` as a choice between two types; these as one optional field.
Text = Annotated[str | None, WithJsonSchema({"type": "string"})]
Whole = Annotated[int | None, WithJsonSchema({"type": "integer"})]
Number = Annotated[float | None, WithJsonSchema({"type": "number"})]
Parameters = Annotated[
    Mapping[str, Any] | None, WithJsonSchema({"type": "object", "additionalProperties": True})
]
