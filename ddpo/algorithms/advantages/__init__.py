"""Kinds of advantages, one file each; `base.py` has what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from ddpo.algorithms.advantages.base import Advantages
from ddpo.algorithms.advantages.batch import BatchAdvantages
from ddpo.algorithms.advantages.group import GroupAdvantages
from ddpo.algorithms.advantages.leave_one_out import LeaveOneOutAdvantages
from ddpo.algorithms.advantages.per_prompt import PerPromptAdvantages
from ddpo.algorithms.advantages.value import ValueAdvantages

ADVANTAGES = (
    PerPromptAdvantages,
    BatchAdvantages,
    LeaveOneOutAdvantages,
    GroupAdvantages,
    ValueAdvantages,
)
"""The registry: a new kind is a file and an entry here."""

if TYPE_CHECKING:
    AnyAdvantages = Advantages
else:
    AnyAdvantages = Annotated[Union[ADVANTAGES], Field(discriminator="type")]  # noqa: UP007

__all__ = [
    "ADVANTAGES",
    "Advantages",
    "AnyAdvantages",
    "BatchAdvantages",
    "GroupAdvantages",
    "LeaveOneOutAdvantages",
    "PerPromptAdvantages",
    "ValueAdvantages",
]
