"""Signs that a policy exploits its reward, in an evaluation against the first checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ddpo.analysis.evaluation.image_statistics import STATISTICS
from ddpo.analysis.evaluation.summary import labels_in
from ddpo.store.tables import EvaluationRow

_LEAST_DIVERSITY = 0.7
"""Of the first checkpoint's."""
_TAIL = 0.05
"""Share of the first checkpoint's images below, and above, its range."""
_NAMES = {
    "brightness": "the brightness",
    "dark": "the share of dark pixels",
    "blown": "the share of blown pixels",
    "edges": "the share of edges",
    "entropy": "the entropy of colors",
    "jpeg_kb": "the size as a JPEG",
}
_SLACK = dict.fromkeys(_NAMES, 0.02) | {"entropy": 0.25, "jpeg_kb": 0.1}
"""How far outside the range a mean must be: a range may have no width, such as that of the share of
dark pixels where no image has any."""


def alarms(
    own: str,
    metrics: Mapping[str, float],
    before: Mapping[str, float],
    baseline: Sequence[EvaluationRow],
) -> list[str]:
    """Return what looks wrong with a checkpoint, a clause each; empty if nothing does.

    A judge falls while the run's own reward rises, each by more than chance (the intervals of their
    gains exclude 0); the mean of a statistic of images leaves the range of the first checkpoint's
    images, from their 5% to their 95% quantile; images of one prompt are less than 0.7 times as
    diverse as at first.

    Args:
        own: Label of the run's own reward.
        metrics: Summary of the checkpoint's evaluation.
        before: That of the first checkpoint.
        baseline: The first checkpoint's rows.
    """
    found: list[str] = []
    rises = metrics.get(f"{own}/gain_low", 0.0) > 0
    for label in labels_in(metrics):
        if label != own and rises and metrics.get(f"{label}/gain_high", 0.0) < 0:
            found.append(
                f"{label} fell by {-metrics[f'{label}/gain']:.4g} while {own} rose by "
                f"{metrics[f'{own}/gain']:.4g}"
            )
    for name in STATISTICS:
        values = [value for row in baseline if (value := row.columns.get(name)) is not None]
        mean = metrics.get(f"images/{name}")
        if mean is None or not values:
            continue  # another version of ddpo, without this statistic, has evaluated it
        low, high = np.quantile(values, (_TAIL, 1 - _TAIL))
        if not low - _SLACK[name] <= mean <= high + _SLACK[name]:
            found.append(
                f"{_NAMES[name]} is {mean:.3g}, outside the {low:.3g} to {high:.3g} of the first "
                "checkpoint's images"
            )
    diversity, at_first = metrics.get("diversity"), before.get("diversity")
    if diversity is not None and at_first and diversity < _LEAST_DIVERSITY * at_first:
        found.append(
            f"images of one prompt are {diversity / at_first:.0%} as diverse as at the first "
            "checkpoint"
        )
    return found
