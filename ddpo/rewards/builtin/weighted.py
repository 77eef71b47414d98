"""A weighted sum of rewards, each standardised by constants from the config, or by its group."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence, Set
from contextvars import ContextVar
from dataclasses import asdict
from typing import Annotated, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

from ddpo.errors import ConfigError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Reward, Scores, group_weights
from ddpo.rewards.columns import RESERVED_COLUMNS
from ddpo.rewards.identity import RewardIdentity
from ddpo.rewards.registry import load_reward
from ddpo.rewards.scoring import score_images

VERSION = "1"
DEEPEST = 4
"""Maximum nesting of sums; deeper means that a reward contains itself."""

FAILED_COLUMN = "failed_components"

_LABEL = r"[A-Za-z_][A-Za-z0-9_-]{0,39}"
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9_-]+")
_depth: ContextVar[int] = ContextVar("depth of weighted sums", default=0)


class Component(BaseModel):
    """One reward of a weighted sum."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """A registered name, or an import path."""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """Parameters of that reward."""
    weight: FiniteFloat = 1.0
    """Negative for a penalty; 0 only reports the component."""
    mean: FiniteFloat = 0.0
    """Subtracted from its value; `ddpo score NAME --run R` measures it."""
    std: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    """Divides the difference; measured the same way."""
    label: Annotated[str, Field(pattern=f"^{_LABEL}$")] | None = None
    """Name of its columns; by default the reward's name."""


class Weighted:
    """Reward = sum over the components of weight * (value - mean) / std.

    Means and standard deviations are constants, because one shard does not see the whole epoch. The
    column ``<label>`` is a component's own value, and ``<label>.<column>`` are its columns; labels
    are unique, so columns never collide. Repeated names are numbered: ``starter_vqa_1``,
    ``starter_vqa_2``. A sample fails if any component fails on it; ``failed_components`` lists
    which.

    With ``normalise: group``, advantages are not those of the sum: each component's are computed in
    the sample's group, and their weighted sum is the sample's. The sum is then shown only.

    The identity contains those of all components.

    Args:
        rewards: The components: each a ``name``, and optionally ``parameters``, ``weight`` (1),
            ``mean`` (0), ``std`` (1) and ``label``.
        normalise: What components are standardised by before they are summed: ``constants``, or
            their ``group``, which needs ``algorithm.advantages.type: group``.

    Raises:
        ConfigError: A component cannot be loaded, two share a label, one contains itself, or one is
            a sum that is normalised by group.
    """

    needs: ClassVar[str] = "what its components need"
    thread_safe: ClassVar[bool] = True  # its components wait, if they have to

    def __init__(
        self,
        rewards: Annotated[tuple[Component, ...], Field(min_length=1)],
        normalise: Literal["constants", "group"] = "constants",
    ) -> None:
        self._components = rewards
        self._labels = _labels(rewards)
        with _one_deeper():
            self._rewards = [load_reward(part.name, part.parameters) for part in rewards]
        parts: list[JsonValue] = [
            {
                "label": label,
                "weight": component.weight,
                "mean": component.mean,
                "std": component.std,
                "identity": asdict(reward.identity),
            }
            for label, component, reward in self._parts()
        ]
        self._check_parts()
        weights = {label: component.weight for label, component, _ in self._parts()}
        self.group_weights = weights if normalise == "group" else {}
        how: dict[str, JsonValue] = {} if normalise == "constants" else {"normalise": normalise}
        self.identity = RewardIdentity("weighted", {"rewards": parts, **how}, version=VERSION)

    @property
    def connection(self) -> tuple[object, ...]:
        """Where its components are reached, of those that a service computes."""
        return tuple(getattr(reward, "connection", None) for reward in self._rewards)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images with each component.

        Raises:
            RewardError: A component raised, or returned invalid scores.
        """
        total = np.zeros(len(images), np.float64)
        failures: list[list[str]] = [[] for _ in images]
        columns: dict[str, Sequence[object]] = {}
        for label, component, reward in self._parts():
            scores = score_images(reward, images, prompts)
            values = scores.values.astype(np.float64)
            total += component.weight * (values - component.mean) / component.std
            for index in np.flatnonzero(scores.failed):
                failures[index].append(label)
            columns[label] = values.tolist()
            columns |= {f"{label}.{name}": column for name, column in scores.columns.items()}
        columns[FAILED_COLUMN] = [", ".join(labels) for labels in failures]
        return Scores(total, failed=np.array([bool(f) for f in failures], bool), columns=columns)

    def _check_parts(self) -> None:
        for label, _, reward in self._parts():
            if group_weights(reward):
                raise ConfigError(
                    f"reward 'weighted': the component {label!r} is a sum with `normalise: group`, "
                    "which decides how advantages are computed and so cannot be part of a sum; "
                    "list its components directly"
                )

    def _parts(self) -> Iterator[tuple[str, Component, Reward]]:
        return zip(self._labels, self._components, self._rewards, strict=True)


@contextlib.contextmanager
def _one_deeper() -> Iterator[None]:
    depth = _depth.get() + 1
    if depth > DEEPEST:
        raise ConfigError(
            f"reward 'weighted' is nested more than {DEEPEST} levels deep: one of its components "
            "contains itself; list the components of the inner sums directly"
        )
    token = _depth.set(depth)
    try:
        yield
    finally:
        _depth.reset(token)


def _labels(components: Sequence[Component]) -> list[str]:
    """Return a unique label per component that no reserved column has."""
    chosen = [part.label for part in components if part.label is not None]
    reserved = {*RESERVED_COLUMNS, FAILED_COLUMN}
    for label in chosen:
        if label in reserved or chosen.count(label) > 1:
            raise ConfigError(
                f"reward 'weighted': the label {label!r} is used by two components, or is the name "
                "of a column that every table has; give each component a unique label"
            )
    taken = {*reserved, *chosen}
    names = [_label_of(part.name) for part in components if part.label is None]
    labels: list[str] = []
    for part in components:
        label = part.label or _unused(_label_of(part.name), names, taken)
        taken.add(label)
        labels.append(label)
    return labels


def _unused(name: str, names: Sequence[str], taken: Set[str]) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    candidates = itertools.chain([name] if names.count(name) == 1 else [], numbered)
    return next(candidate for candidate in candidates if candidate not in taken)


def _label_of(name: str) -> str:
    """Return a name, or the last part of an import path, in the characters allowed in labels."""
    plain = _OTHER_CHARACTERS.sub("_", re.split(r"[:.]", name)[-1])[:36]
    return plain if re.match(r"[A-Za-z_]", plain) else f"_{plain}"
