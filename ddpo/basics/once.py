"""Values that are computed once, whichever threads ask for them first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, Self, TypeVar, overload

T = TypeVar("T")


class once_property(cached_property[T]):
    """A cached property that is computed once, even if several threads ask for it at once.

    `functools.cached_property` locks in Python 3.11 only: in later versions, threads that ask at
    the same time compute it once each, which for a reward means one model each.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        super().__init__(compute)
        self._computing = threading.RLock()

    @overload
    def __get__(self, instance: None, owner: type[Any] | None = None) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type[Any] | None = None) -> T: ...
    def __get__(self, instance: object | None, owner: type[Any] | None = None) -> Self | T:
        """Return the value; the first call computes it."""
        if instance is None or self.attrname in vars(instance):
            return super().__get__(instance, owner)
        with self._computing:
            return super().__get__(instance, owner)
