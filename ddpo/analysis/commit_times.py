"""When epochs were committed, and how long one takes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from statistics import median

from ddpo.errors import StoreError
from ddpo.runs import Run
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH


def commit_times(run: Run, epochs: Sequence[int]) -> list[tuple[int, datetime]]:
    """Return when epochs were committed, by number; nothing where the store keeps no times.

    Args:
        run: The run.
        epochs: Their numbers; one that is not committed is left out.
    """
    wheres = [Partition(run.run_id, epoch) for epoch in epochs]
    try:
        times = [run.store.modified(EPOCH.key(where)) for where in wheres]
    except StoreError:
        return []
    return [(where.epoch, at) for where, at in zip(wheres, times, strict=True) if at]


def seconds_per_epoch(commits: Sequence[tuple[int, datetime]]) -> float | None:
    """Return the median time between two commits; None for fewer than two.

    Breaks between two starts of a run hardly count.
    """
    took = [
        (later - earlier).total_seconds() / (number - before)
        for (before, earlier), (number, later) in pairwise(commits)
    ]
    return median(took) if took else None
