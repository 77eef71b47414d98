"""What a reward is, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ddpo.errors import RewardError, UnusableScores
from ddpo.prompts.base import Prompt
from ddpo.rewards.columns import storable
from ddpo.rewards.identity import RewardIdentity


@dataclass(frozen=True, eq=False)
class Scores:
    """A reward's scores of B images; higher is better.

    Raises:
        UnusableScores: Values are not numbers, or not one per sample.
        RewardError: A sample that is not marked as failed has a non-finite value.
    """

    values: np.ndarray
    """Rewards, float32 [B], in the reward's own unit; given as anything NumPy converts. Finite,
    except where ``failed``: there it becomes nan, whatever was given."""
    failed: np.ndarray = field(default=None)  # pyright: ignore[reportAssignmentType]  # set below
    """Samples that could not be scored, bool [B]; by default none."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """What else the reward reports (a caption, a component), by name: B numbers or texts each,
    stored beside the reward. What cannot be stored is left out; see `columns.storable`."""

    def __post_init__(self) -> None:
        values = _array("values", self.values, np.float32)
        count = len(values)
        failed = np.zeros(count, bool) if self.failed is None else _array("failed", self.failed)
        if failed.dtype != bool or failed.shape != (count,):
            raise UnusableScores(
                f"failed must be bool [{count}], like values, not {failed.dtype} "
                f"{list(failed.shape)}"
            )
        values[failed] = np.nan
        wrong = np.flatnonzero(~np.isfinite(values) & ~failed)
        if len(wrong):
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise RewardError(
                f"sample {wrong[0]} of {count}{more} has the reward {values[wrong[0]]}; return a "
                "finite float32, or mark the sample in Scores.failed"
            )
        values.setflags(write=False)
        failed.setflags(write=False)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "failed", failed)
        object.__setattr__(self, "columns", storable(self.columns, count))

    def __len__(self) -> int:
        return len(self.values)


@runtime_checkable
class Reward(Protocol):
    """Scores images. Higher is better; a score does not depend on the rest of its batch."""

    @property
    def identity(self) -> RewardIdentity:
        """Two rewards of equal identity give equal scores."""
        ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images, each generated for the prompt with the same index."""
        ...


def group_weights(reward: Reward) -> Mapping[str, float]:
    """Return which of a reward's columns are normalised each in its group before they are summed.

    Args:
        reward: A sum that asks for it says so by its attribute ``group_weights``.

    Returns:
        The weights of the columns by name; empty for rewards whose score is what is normalised.
    """
    return getattr(reward, "group_weights", None) or {}


def _array(name: str, given: Any, dtype: type | None = None) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # becomes inf, which is rejected by sample
            array = np.array(_on_cpu(given))
            if np.iscomplexobj(array):  # NumPy would drop the imaginary part
                raise TypeError("they are complex")
            array = array.astype(array.dtype if dtype is None else dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UnusableScores(f"cannot convert {name} to an array of numbers: {error}") from error
    if array.ndim != 1:
        raise UnusableScores(
            f"{name} must have the shape [B], one per sample, not {list(array.shape)}"
        )
    return array


def _on_cpu(given: Any) -> Any:
    """Return tensors, alone or in a list, in a form that NumPy reads whatever device they are on.

    Anything else is returned as it is.
    """
    if isinstance(given, list | tuple):
        return [value.item() if hasattr(value, "item") else value for value in given]
    return given.tolist() if hasattr(given, "detach") else given
