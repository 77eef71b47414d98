"""Progress of tasks, for a display in the same process and, in lines, for its log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

LOGGER = "ddpo_workflow.progress"
"""The logger of the lines; its level INFO is shown to users."""

OWN_LOGGERS = ("ddpo", "ddpo_workflow")
"""The loggers of this project's packages."""

VERBS = {
    "champion": "drawing the champion's images by plain diffusers",
    "evaluation": "evaluating",
    "export": "exporting the weights",
    "pictures": "sampling the fixed prompts",
    "sample": "sampling",
    "score": "scoring",
    "statistics": "scoring the epochs before the fork",
    "update": "updating",
}
"""What a stage does."""

_LONG_EPOCH_S = 60.0

_logger = logging.getLogger(LOGGER)


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


class Pace:
    """How long epochs take; those that an earlier start has committed do not count."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None
        self._done = 0

    @property
    def computes(self) -> bool:
        """Whether anything was computed."""
        return self._began is not None

    def begin(self) -> None:
        """Note that something is being computed."""
        if self._began is None:
            self._began = (time.monotonic(), self._done)

    def left_s(self, done: int, total: int) -> float | None:
        """Note that epochs are done; return the seconds until all are, None if it is unknown."""
        self._done = done
        if self._began is None:
            return None
        began, since = self._began
        return (time.monotonic() - began) / max(done - since, 1) * (total - done)


class _Lines:
    """Logs one line per epoch and, in the first epoch and while epochs are long, one per stage."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._stages: set[str] = set()
        self._epoch_began = 0.0
        self._long = True  # until it is known

    def stage(self, name: str) -> None:
        """Log a stage when it begins; stages may overlap."""
        self._pace.begin()
        if not self._stages:
            self._epoch_began = time.monotonic()
        if name not in self._stages:
            self._stages.add(name)
            if self._long:
                _logger.info("%s ...", VERBS.get(name, name))

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Log that an epoch is done."""
        reward = metrics.get("reward/mean")
        parts = ["no mean reward" if reward is None else f"mean reward {reward:.4g}"]
        left_s = self._pace.left_s(done, total)
        if self._stages:
            took_s = time.monotonic() - self._epoch_began
            self._long = took_s > _LONG_EPOCH_S
            parts.append(_duration(took_s))
        else:
            parts.append("already done")
        if left_s is not None and done < total:
            parts.append(f"{_duration(left_s)} left")
        self._stages.clear()
        _logger.info("epoch %d of %d: %s", done, total, ", ".join(parts))


_shown: Progress = _Silent()
_lines: _Lines | None = None


def show_by(progress: Progress) -> None:
    """Show the progress of this process's tasks on a display from now on.

    Args:
        progress: The display.
    """
    global _shown
    _shown = progress


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
def logged() -> Iterator[None]:
    """Log the progress of a run within this context."""
    global _lines
    before, _lines = _lines, _Lines()
    try:
        yield
    finally:
        _lines = before


def note(text: str) -> None:
    """Log a line of text."""
    _logger.info("%s", text)


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
        name: The stage, one of `VERBS`.
        done: Units that are done.
        total: Units in all.
    """
    begin_stage(name)
    _shown.stage(name, done, total)


def begin_stage(name: str) -> None:
    """Log that a stage begins that has no progress of its own, or runs beside others.

    Args:
        name: The stage, one of `VERBS`.
    """
    if _lines:
        _lines.stage(name)


def finished_epoch(done: int, total: int, metrics: Mapping[str, float]) -> None:
    """Report that an epoch is done.

    Args:
        done: Number of epochs done.
        total: Number of epochs in all.
        metrics: Metrics of the last one.
    """
    if _lines:
        _lines.epoch(done, total, metrics)
    _shown.epoch(done, total, metrics)


def _duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as ``1 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
