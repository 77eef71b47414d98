"""Signs that a policy exploits its reward, in an evaluation against the first checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ddpo.analysis.evaluation.summary import labels_in
from ddpo.config import GateConfig
from ddpo.store.tables import EvaluationRow

CLIPPED, CONSTANT = "clip_fraction", "constant_prompts"
"""Names of the two signs that an epoch's training gives."""
_NAMES = {
    "brightness": "the brightness",
    "dark": "the share of dark pixels",
    "blown": "the share of blown pixels",
    "edges": "the share of edges",
    "entropy": "the entropy of colors",
    "jpeg_kb": "the size as a JPEG",
}
_LEAST_SPREAD = dict.fromkeys(_NAMES, 0.02) | {"entropy": 0.15, "jpeg_kb": 0.05}
"""Standard deviations that are not taken smaller: the images may all have the same value, such as 0
for the share of dark pixels."""


def alarms(
    own: str,
    metrics: Mapping[str, float],
    before: Mapping[str, float],
    baseline: Sequence[EvaluationRow],
    limits: GateConfig,
    training: Mapping[str, float] | None = None,
) -> list[str]:
    """Return which limits a checkpoint has passed, a clause each; empty if none.

    Args:
        own: Label of the run's own reward.
        metrics: Summary of the checkpoint's evaluation.
        before: That of the first checkpoint.
        baseline: The first checkpoint's rows.
        limits: The limits.
        training: Signs from the epoch before the checkpoint, as far as they are known.
    """
    return [
        *(_fallen_judges(own, metrics) if limits.judges else ()),
        *_strange_images(metrics, baseline, limits),
        *_values_beyond(metrics, before, training or {}, limits),
    ]


def constant_share(prompts: Sequence[str], rewards: Sequence[float | None]) -> float | None:
    """Return the share of an epoch's prompts whose samples all have the same reward.

    Args:
        prompts: The prompt of each sample.
        rewards: Its reward; None where there is none.

    Returns:
        The share, of the prompts with more than one reward; None if there are none.
    """
    found: dict[str, list[float]] = {}
    for prompt, reward in zip(prompts, rewards, strict=True):
        if reward is not None:
            found.setdefault(prompt, []).append(reward)
    several = [values for values in found.values() if len(values) > 1]
    return sum(min(v) == max(v) for v in several) / len(several) if several else None


def _fallen_judges(own: str, metrics: Mapping[str, float]) -> Iterator[str]:
    """Find judges that fall while the run's own reward rises, each by more than chance.

    By more than chance means that the 95% interval of the gain excludes 0.
    """
    if metrics.get(f"{own}/gain_low", 0.0) <= 0:
        return
    for label in labels_in(metrics):
        if label != own and metrics.get(f"{label}/gain_high", 0.0) < 0:
            yield (
                f"{label} fell by {-metrics[f'{label}/gain']:.4g} while {own} rose by "
                f"{metrics[f'{own}/gain']:.4g}"
            )


def _strange_images(
    metrics: Mapping[str, float], baseline: Sequence[EvaluationRow], limits: GateConfig
) -> Iterator[str]:
    """Find statistics of images whose mean has moved too far."""
    for name in limits.statistics:
        values = [value for row in baseline if (value := row.columns.get(name)) is not None]
        mean = metrics.get(f"images/{name}")
        if mean is None or not values:
            continue  # another version of ddpo, without this statistic, has evaluated it
        before, spread = float(np.mean(values)), max(float(np.std(values)), _LEAST_SPREAD[name])
        shift = (mean - before) / spread
        if abs(shift) > limits.most_shifted:
            yield (
                f"{_NAMES[name]} is {mean:.3g}, {abs(shift):.1f} standard deviations "
                f"{'above' if shift > 0 else 'below'} the {before:.3g} of the first checkpoint's "
                "images"
            )


def _values_beyond(
    metrics: Mapping[str, float],
    before: Mapping[str, float],
    training: Mapping[str, float],
    limits: GateConfig,
) -> Iterator[str]:
    diversity, at_first = metrics.get("diversity"), before.get("diversity")
    least = limits.least_diversity
    if least is not None and diversity is not None and at_first and diversity < least * at_first:
        yield (
            f"images of one prompt are {diversity / at_first:.0%} as diverse as at the first "
            "checkpoint"
        )
    for value, most, name in (
        (metrics.get("kl_to_base"), limits.most_kl, "the KL divergence from the base model"),
        (training.get(CLIPPED), limits.most_clipped, "the clip fraction"),
        (training.get(CONSTANT), limits.most_constant, "the share of prompts with one reward"),
    ):
        if value is not None and most is not None and value > most:
            yield f"{name} is {value:.3g}, over {most:g}"
