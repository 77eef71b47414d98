"""Progress of tasks, for a display in the same process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A display of progress; called from the threads of tasks."""

    def stage(self, name: str, done: float, total: float) -> None:
        """Show that ``done`` of ``total`` units of a stage are done."""
        ...

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show that ``done`` of ``total`` epochs are done, and the metrics of the last one."""
        ...


class _Silent:
    def stage(self, name: str, done: float, total: float) -> None:
        """Show nothing."""

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show nothing."""


_shown: Progress = _Silent()


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Show the progress of this process's tasks on a display within this context."""
    global _shown
    before, _shown = _shown, progress
    try:
        yield
    finally:
        _shown = before


@contextmanager
def as_part(before: int, total: int) -> Iterator[None]:
    """Show the epochs of a run as part of several runs within this context.

    Args:
        before: Number of epochs of the runs before it.
        total: Number of epochs of all runs together.
    """
    with shown_by(_Part(_shown, before, total)):
        yield


class _Part:
    """The display of one of several runs that are shown as one."""

    def __init__(self, whole: Progress, before: int, total: int) -> None:
        self._whole, self._before, self._total = whole, before, total

    def stage(self, name: str, done: float, total: float) -> None:
        """Show a stage unchanged."""
        self._whole.stage(name, done, total)

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show an epoch as one of the epochs of all runs."""
        self._whole.epoch(self._before + done, self._total, metrics)


def report(name: str, done: float, total: float) -> None:
    """Report the progress of a stage.

    Args:
        name: The stage: ``pictures``, ``sample`` or ``update``.
        done: Units that are done.
        total: Units in all.
    """
    _shown.stage(name, done, total)


def finished_epoch(done: int, total: int, metrics: Mapping[str, float]) -> None:
    """Report that an epoch is done.

    Args:
        done: Number of epochs done.
        total: Number of epochs in all.
        metrics: Metrics of the last one.
    """
    _shown.epoch(done, total, metrics)
