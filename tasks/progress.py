"""Progress within a task, for whoever shows it in the same process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told how far a task is; called from the task's thread."""

    def stage(self, name: str, done: float, total: float) -> None:
        """Say that stage ``name`` has done ``done`` of ``total``."""
        ...

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Say that ``done`` of ``total`` epochs are done, and what the last one measured."""
        ...


class _Silent:
    def stage(self, name: str, done: float, total: float) -> None:
        """Say nothing."""

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Say nothing."""


_shown: Progress = _Silent()


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Show progress of this process's tasks by ``progress`` meanwhile."""
    global _shown
    before, _shown = _shown, progress
    try:
        yield
    finally:
        _shown = before


@contextmanager
def as_part(before: int, total: int) -> Iterator[None]:
    """Count the epochs of a run as some of many, meanwhile.

    Args:
        before: Epochs of the runs before it.
        total: Epochs of all runs together.
    """
    with shown_by(_Part(_shown, before, total)):
        yield


class _Part:
    """One of several runs that are shown as one."""

    def __init__(self, whole: Progress, before: int, total: int) -> None:
        self._whole, self._before, self._total = whole, before, total

    def stage(self, name: str, done: float, total: float) -> None:
        """Show how far a stage is, as it is."""
        self._whole.stage(name, done, total)

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show an epoch as one of all."""
        self._whole.epoch(self._before + done, self._total, metrics)


def report(name: str, done: float, total: float) -> None:
    """Report how far a stage is.

    Args:
        name: What is being done: ``sample``, ``update``.
        done: How much of it is done.
        total: How much it is.
    """
    _shown.stage(name, done, total)


def finished_epoch(done: int, total: int, metrics: Mapping[str, float]) -> None:
    """Report that an epoch is done.

    Args:
        done: Epochs done.
        total: Epochs in all.
        metrics: What the last one measured.
    """
    _shown.epoch(done, total, metrics)
