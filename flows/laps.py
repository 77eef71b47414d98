"""Seconds spent in the stages of an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Laps:
    """A stopwatch by stage: ``with laps("sample"): ...``."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage, or more of it.

        Args:
            stage: Its name.
        """
        start = time.monotonic()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.monotonic() - start

    def timings(self, samples: int) -> dict[str, float]:
        """Return the seconds of each stage, and the rate over sampling, scoring and training.

        Args:
            samples: Number of samples of the epoch.
        """
        timings = {f"{stage}_s": seconds for stage, seconds in self._seconds.items()}
        rated = sum(self._seconds[stage] for stage in ("sample", "score_wait", "update"))
        return {**timings, "images_per_s": samples / rated}
