"""The engine of one process: a task computes in its own thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ddpo_workflow.tasks.engines.base import ALONE

P = ParamSpec("P")
R = TypeVar("R")


class Local:
    """Runs functions in the calling thread; they take turns by locking the device."""

    workers = 1

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function; see `Engine.call`."""
        return function(*args, **kwargs)

    def together(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function as the only rank; see `Engine.together`."""
        return function(ALONE, *args)

    def close(self) -> None:
        """End nothing."""
