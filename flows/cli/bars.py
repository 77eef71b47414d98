"""Progress bars: epoch, stage, images per second, latest reward, time left."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

_VERBS = {
    "pictures": "sampling the fixed prompts",
    "sample": "sampling",
    "update": "updating",
}


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
        self._first_epoch: tuple[float, int] | None = None
        self._epochs_done = 0

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
            if self._first_epoch is None:
                self._first_epoch = (now, self._epochs_done)
                self._progress.update(self._run, note="")
            self._progress.reset(self._stage, total=total, visible=True)
        note = ""
        if name == "sample" and done > self._done_at_start:
            speed = (done - self._done_at_start) / (now - self._began)
            note = f"{speed:.1f} images/s"
        verb = _VERBS.get(name, name)
        self._progress.update(self._stage, description=f"  {verb}", completed=done, note=note)

    def epoch(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show that an epoch is done, its reward, and the time left."""
        now = time.monotonic()
        self._epochs_done = done
        began, since = self._first_epoch or (now, done)
        left_s = (now - began) / max(done - since, 1) * (total - done)
        reward = metrics.get("reward/mean")
        notes = [] if reward is None else [f"reward {reward:.4g}"]
        if done < total and self._first_epoch is not None:
            notes.append(f"{_duration(left_s)} left")
        if self._name == "":
            # Nothing was computed: an earlier start has committed this epoch.
            notes.append("already done")
        else:
            self._first_epoch = (began, since)
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
