"""Settings of what is chosen by name: prompt sets and rewards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from ddpo.basics.part import JsonMapping, Part


class NamedConfig(Part):
    """A plug-in by name, with its parameters."""

    name: str
    """A registered name, or an import path `package.module:attribute` of your own."""
    parameters: JsonMapping = Field(default_factory=dict)
    """Checked against what the plug-in accepts."""


class RewardConfig(NamedConfig):
    """A reward, and what happens to samples that it cannot score."""

    tries: PositiveInt = 2
    """How often scoring a sample is tried before it counts as failed."""
    on_failure: Literal["drop", "impute", "fail"] = "drop"
    """`drop`: failed samples are excluded from all statistics and from training. `impute`: they
    count as their prompt's mean in the update, but are excluded from all statistics; where the
    prompt has no reward yet, they are dropped. `fail`: the shard's task fails, and with it the
    run."""

    @property
    def normalises_by_group(self) -> bool:
        """Whether it is a sum whose parts are normalised each in its group."""
        return self.name == "weighted" and self.parameters.get("normalise") == "group"
