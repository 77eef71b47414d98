"""Values that are computed once, whichever threads ask for them first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")


class once_property(cached_property[T]):
    """A cached property that is computed once, even if several threads ask for it at once.

    `functools.cached_property` locks in Python 3.11 only: in later versions, threads that ask at
    the same time compute it once each, which for a reward means one model each.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        super().__init__(compute)
        self._computing = threading.RLock()

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        """Return the value; the first call computes it."""
        if instance is None or self.attrname in vars(instance):
            return super().__get__(instance, owner)
        with self._computing:
            return super().__get__(instance, owner)
