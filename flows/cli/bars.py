"""Progress bars: epoch, stage, images per second, latest reward, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ddpo_workflow.flows.cli.screen import redraws
from ddpo_workflow.tasks.progress import VERBS, Pace, shown_by


@contextmanager
def bars_in_terminal(console: Console, run_id: str, epochs: int) -> Iterator[None]:
    """Show bars within this context if the screen is a terminal; otherwise, the log has lines.

    Args:
        console: The screen.
        run_id: The name of the run or comparison.
        epochs: Its number of epochs.
    """
    if not redraws(console):
        yield
        return
    with Bars(console, run_id, epochs) as bars, shown_by(bars):
        yield


class Bars:
    """A bar for the run and one for its current stage; shown while used as a context."""

    def __init__(self, console: Console, run_id: str, epochs: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )
        self._run = self._progress.add_task(run_id, total=epochs, note="starting")
        self._stage = self._progress.add_task("", total=1.0, note="", visible=False)
        self._name = ""
        self._began = 0.0
        self._done_at_start = 0.0
        self._pace = Pace()

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.update(self._stage, visible=False)
        self._progress.stop()

    def stage(self, name: str, done: float, total: float) -> None:
        """Show the progress of a stage."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._began, self._done_at_start = name, now, done
            if not self._pace.computes:
                self._pace.begin()
                self._progress.update(self._run, note="")
            self._progress.reset(self._stage, total=total, visible=True)
        note = ""
        if name == "sample" and done > self._done_at_start and now > self._began:
            speed = (done - self._done_at_start) / (now - self._began)
            note = f"{speed:.1f} images/s"
        verb = VERBS.get(name, name)
        self._progress.update(self._stage, description=f"  {verb}", completed=done, note=note)

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show that an epoch is done, its reward, and the time left."""
        left_s = self._pace.left_s(done, total)
        reward = metrics.get("reward/mean")
        notes = [] if reward is None else [f"reward {reward:.4g}"]
        if left_s is None:
            # Nothing was computed: an earlier start has committed this epoch.
            notes.append("already done")
        elif done < total:
            notes.append(f"{_duration(left_s)} left")
        self._progress.update(
            self._run,
            completed=done,
            description=f"epoch {done}/{total}",
            note="  ".join(notes),
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
