"""A comparison: several settings of one run, each with several seeds, on shared first samples."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from ddpo.basics.limits import Seed
from ddpo.basics.part import JsonMapping, Part

VARIED = ("algorithm", "optimizer")
"""What variants may differ in; all else decides what is sampled, or how it is scored."""

SHARED = "shared"
"""The name of the run that generates the shared samples, which no variant may have."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,40}")


class CompareConfig(Part):
    """What is compared, and for how long; `ddpo compare` reads it from its own YAML file."""

    base: str | JsonMapping
    """A run's config: the path of a YAML file, relative to this one, or its content. Its seed is
    ignored; its epochs apply if none are given here."""
    variants: dict[str, JsonMapping]
    """Name to what differs from the base: `algorithm`, `optimizer`. A part that names a `type`
    replaces the base's, any other changes some of its settings; so does `advantages` within
    `algorithm`. The first variant is what the others are compared with."""
    controls: dict[str, str] = Field(default_factory=dict)
    """Variant to its control, a variant that is trained the same way but blind to the reward, by
    `algorithm: {advantages: {shuffle: true}}` or `algorithm: {beta: 0}`. The result says how far a
    variant is above its control."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Each variant is run with each seed. Confidence intervals are over seeds: they need at least
    2, and more make them narrower."""
    epochs: int | None = Field(default=None, ge=2)
    """Epochs of each run; by default the base's. The samples of the last one measure the result."""
    offline: bool = False
    """All variants train on one history that the base model generated, off-policy after the first
    update, and generate only the last epoch themselves. By default they share the first epoch."""

    @field_validator("variants")
    @classmethod
    def _can_be_compared(cls, value: dict[str, JsonMapping]) -> dict[str, JsonMapping]:
        if len(value) < 2:
            raise ValueError(f"there is only {len(value)} variant; expected at least two variants")
        for name, changes in value.items():
            if name == SHARED or not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot be a variant's name; expected letters, digits, '.', '_' or "
                    f"'-', 40 at most, and not {SHARED!r}"
                )
            if others := [part for part in changes if part not in VARIED]:
                raise ValueError(
                    f"variant {name!r} changes {', '.join(others)}, but runs that share samples "
                    "must generate and score them the same way; variants may differ in "
                    f"{' and '.join(VARIED)}, everything else belongs in the base"
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
