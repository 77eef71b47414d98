"""Summary of a checkpoint's evaluation: its images, and scores compared with the first one's.

The same prompts and seeds are sampled with every checkpoint, so images are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ddpo.analysis.evaluation.image_statistics import (
    STATISTICS,
    diversity,
    image_statistics,
    thumbnail,
)
from ddpo.analysis.intervals import Interval, interval
from ddpo.basics.images import decode_image
from ddpo.store.tables import EvaluationRow, RolloutRow

SCORE = "score."
"""What the names of columns with scores begin with; the reward's label follows."""


def reward_labels(names: Sequence[str], reward_ids: Sequence[str]) -> list[str]:
    """Return a short label for each reward: its name without the module, or its id if two clash.

    Args:
        names: Names of the rewards, as in the config.
        reward_ids: Their ids.
    """
    short = [name.rpartition(":")[2] for name in names]
    return [
        label if short.count(label) == 1 else reward_id
        for label, reward_id in zip(short, reward_ids, strict=True)
    ]


def evaluation_rows(
    samples: Sequence[RolloutRow],
    seeds: Sequence[int],
    scores: Mapping[str, Mapping[str, float | None]],
) -> list[EvaluationRow]:
    """Return a row per image, with its scores and statistics.

    Args:
        samples: The images, in the order they were sampled.
        seeds: The evaluation's seed of each.
        scores: By reward label, the score of each sample id.
    """
    return [
        EvaluationRow(
            sample_id=sample.sample_id,
            prompt=sample.prompt,
            seed=seed,
            columns={
                **{f"{SCORE}{label}": found[sample.sample_id] for label, found in scores.items()},
                **image_statistics(decode_image(sample.image_png)),
            },
        )
        for sample, seed in zip(samples, seeds, strict=True)
    ]


def summarize(
    rows: Sequence[EvaluationRow],
    samples: Sequence[RolloutRow],
    baseline: Sequence[EvaluationRow] = (),
    kl: Sequence[float | None] = (),
) -> dict[str, float]:
    """Summarize a checkpoint's evaluation.

    Args:
        rows: A row per image.
        samples: The images.
        baseline: The first checkpoint's rows, of the same prompts and seeds in the same order;
            empty for the first checkpoint itself.
        kl: KL divergence of each denoising step from the base model's; None where deterministic.

    Returns:
        Values by name. For each reward ``LABEL/mean`` and ``LABEL/failed``; against the baseline
        ``LABEL/gain``, the mean difference of paired scores, ``LABEL/gain_low`` and
        ``LABEL/gain_high``, its 95% confidence interval over prompts, and ``LABEL/wins``, the share
        of pairs whose score rose. ``images/NAME``, the mean of each statistic of images;
        ``diversity`` and ``repetition``; ``kl_to_base``, the mean over the steps.
    """
    metrics: dict[str, float] = {}
    columns = sorted({name for row in rows for name in row.columns if name.startswith(SCORE)})
    for column in columns:
        label = column.removeprefix(SCORE)
        values = [row.columns.get(column) for row in rows]
        scored = [value for value in values if value is not None]
        metrics[f"{label}/failed"] = float(len(values) - len(scored))
        if scored:
            metrics[f"{label}/mean"] = float(np.mean(scored))
        metrics |= {f"{label}/{n}": v for n, v in _gain(rows, baseline, column).items()}
    for name in STATISTICS:
        values = [value for row in rows if (value := row.columns[name]) is not None]
        metrics[f"images/{name}"] = float(np.mean(values))
    groups: dict[str, list[np.ndarray]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(thumbnail(decode_image(sample.image_png)))
    metrics |= diversity(list(groups.values()))
    measured = [value for value in kl if value is not None]
    if measured:
        metrics["kl_to_base"] = float(np.mean(measured))
    return metrics


def labels_in(metrics: Mapping[str, float]) -> list[str]:
    """Return the labels of the rewards of a summary."""
    return [name.removesuffix("/failed") for name in metrics if name.endswith("/failed")]


def score_text(metrics: Mapping[str, float], label: str) -> str:
    """Return a reward's mean, and its gain with the half-width of its interval; for people."""
    mean, gain = metrics.get(f"{label}/mean"), metrics.get(f"{label}/gain")
    if mean is None:
        return ""
    text = f"{mean:.4f}"
    if gain is not None:
        low = metrics.get(f"{label}/gain_low")
        text += f"  {gain:+.4f}" + ("" if low is None else f" ± {gain - low:.4f}")
    return text


def _gain(
    rows: Sequence[EvaluationRow], baseline: Sequence[EvaluationRow], column: str
) -> dict[str, float]:
    """Return the mean difference of paired scores; empty if no pair has two scores."""
    differences: dict[str, list[float]] = {}
    for row, before in zip(rows, baseline, strict=False):
        now, then = row.columns.get(column), before.columns.get(column)
        if now is not None and then is not None:
            differences.setdefault(row.prompt, []).append(now - then)
    every = [difference for pairs in differences.values() for difference in pairs]
    if not every:
        return {}
    gain = _over_prompts(differences.values())
    wins = sum(difference > 0 for difference in every) / len(every)
    found = {"gain": gain.mean, "wins": wins}
    if gain.half_width is not None:
        found["gain_low"] = gain.mean - gain.half_width
        found["gain_high"] = gain.mean + gain.half_width
    return found


def _over_prompts(differences: Iterable[Sequence[float]]) -> Interval:
    """Estimate the mean over prompts: images of one prompt are not independent."""
    return interval([float(np.mean(pairs)) for pairs in differences])
