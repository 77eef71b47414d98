"""What a request is: resolved once, ahead of the flow that does it.

Its files are read and everything is checked before a run's name is taken or anything is written.
Heavy libraries are imported by then, so that a misspelt setting is reported at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from ddpo.runs import Run

Plan = TypeVar("Plan")

_resolved: ContextVar[tuple[Request[Any], Any] | None] = ContextVar("resolved", default=None)
_beside_imports: ContextVar[Callable[[], None] | None] = ContextVar("beside", default=None)


class Request(BaseModel, Generic[Plan]):
    """What a user asks for. Its fields are the arguments of the flow that does it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def resolve(self) -> Plan:
        """Read and check everything that the request names.

        Raises:
            DdpoError: It cannot be done; nothing was written.
        """

    @contextmanager
    def resolved(self, beside_imports: Callable[[], None] | None = None) -> Iterator[Plan]:
        """Resolve the request ahead of a flow with the same arguments, called in this context.

        Args:
            beside_imports: Begins what may go on while the libraries of models are imported; called
                once all is checked that needs none of them.
        """
        begun = _beside_imports.set(beside_imports)
        try:
            plan = self.resolve()
        finally:
            _beside_imports.reset(begun)
        token = _resolved.set((self, plan))
        try:
            yield plan
        finally:
            _resolved.reset(token)

    def plan(self) -> Plan:
        """Return what the request resolves to; the caller of the flow may have resolved it."""
        ahead = _resolved.get()
        return ahead[1] if ahead is not None and ahead[0] == self else self.resolve()


def opened(root: str, run_id: str, *, trust: bool) -> Run:
    """Open a stored run, and trust it from now on if the user says so."""
    from ddpo.runs import open_run
    from ddpo.store.objects import Store

    run = open_run(Store.open(root), run_id)
    if trust:
        run.trust()
    return run


def before_models() -> None:
    """Say that the libraries of models are imported next: all that needs none is checked."""
    if begin := _beside_imports.get():
        begin()
