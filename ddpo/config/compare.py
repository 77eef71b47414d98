"""A comparison: several settings of one run, each with several seeds, on shared first samples."""

from __future__ import annotations

import re

from pydantic import Field, JsonValue, NonNegativeInt, field_validator, model_validator

from ddpo.basics.part import Part

VARIED = ("algorithm", "optimizer")
"""What variants may differ in; all else decides what is drawn, or how it is scored."""

SHARED = "shared"
"""What the run that draws the shared samples is called, so that no variant is."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,40}")


class CompareConfig(Part):
    """What is compared, and how long; `ddpo compare` reads it from a YAML of its own."""

    base: str | dict[str, JsonValue]
    """A run's config: a YAML file, found from the folder of this one; or its content. Its seed does
    not count, its epochs do where this says none."""
    variants: dict[str, dict[str, JsonValue]]
    """Name to what differs from the base: `algorithm`, `optimizer`. A part that names a `type`
    replaces the base's, any other changes some of its settings; so does `advantages` within
    `algorithm`. The first variant is what the others are compared with."""
    controls: dict[str, str] = Field(default_factory=dict)
    """Variant to the variant that controls it: trained alike, but blind to the reward, by
    `algorithm: {advantages: {shuffle: true}}` or `algorithm: {beta: 0}`. The result says how far
    above its control it is."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Each variant is run with each of them. The intervals are over seeds: they want at least 2,
    and are narrower with more."""
    epochs: int | None = Field(default=None, ge=2)
    """Epochs of each run; by default the base's. The last one's samples measure the result."""
    offline: bool = False
    """All variants train on one history that the base model drew, off-policy after the first
    update, and draw the last epoch themselves. By default they share the first epoch alone."""

    @field_validator("variants")
    @classmethod
    def _can_be_compared(
        cls, value: dict[str, dict[str, JsonValue]]
    ) -> dict[str, dict[str, JsonValue]]:
        if len(value) < 2:
            raise ValueError(f"a comparison of {len(value)}; expected at least two variants")
        for name, changes in value.items():
            if name == SHARED or not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot be a variant's name; expected letters, digits, '.', '_' or "
                    f"'-', 40 at most, and not {SHARED!r}"
                )
            if others := [part for part in changes if part not in VARIED]:
                raise ValueError(
                    f"variant {name!r} changes {', '.join(others)}, and runs that share samples "
                    "draw and score them alike; variants may differ in "
                    f"{', '.join(VARIED)}, all else belongs in the base"
                )
        return value

    @model_validator(mode="after")
    def _controls_are_variants(self) -> CompareConfig:
        for name, control in self.controls.items():
            if unknown := [each for each in (name, control) if each not in self.variants]:
                raise ValueError(
                    f"controls has {name}: {control}, and there is no variant {unknown[0]!r}; "
                    f"expected two of {', '.join(self.variants)}"
                )
            if control == name or control in self.controls:
                raise ValueError(
                    f"controls has {name}: {control}, and {control!r} is itself controlled; a "
                    "control is another variant, blind to the reward"
                )
        return self

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"seeds {list(value)}; expected at least one, and each once")
        return value
