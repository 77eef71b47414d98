"""A comparison's page: tables as Markdown, reward against reward queries as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from ddpo.analysis.comparison.plan import Comparison
from ddpo.analysis.comparison.result import Result
from ddpo.analysis.comparison.statistics import LEVEL, Interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

MARKDOWN = "comparison.md"
PLOT = "comparison.png"

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings, and rows of as many cells."""


def result_table(comparison: Comparison, result: Result) -> Table:
    """Return the table of what each variant achieved.

    Args:
        comparison: The comparison.
        result: What it found.
    """
    first, last = result.epochs[0], result.epochs[-1]
    reference = result.variants[0].name
    headings = (
        "variant",
        f"reward, epoch {first}",
        f"reward, epoch {last}",
        "gain",
        f"vs {reference}",
        *(["vs its control"] if comparison.config.controls else []),
    )
    rows = [
        (
            each.name,
            str(each.curve[0]),
            str(each.curve[-1]),
            str(each.gain),
            _or_blank(each.difference),
            *([_or_blank(each.beyond_control)] if comparison.config.controls else []),
        )
        for each in result.variants
    ]
    return headings, rows


def _or_blank(value: Interval | None) -> str:
    return "" if value is None else str(value)


def ratio_table(result: Result) -> Table:
    """Return the table of importance ratios on a shared history; without rows where there is none.

    Args:
        result: What a comparison found.
    """
    headings = ("variant", "epoch", "ratio, mean", "smallest", "largest", "clip fraction")
    rows = [
        (
            each.variant,
            str(each.epoch),
            *(f"{v:.5g}" for v in (each.mean, each.smallest, each.largest, each.clip_fraction)),
        )
        for each in result.ratios
    ]
    return headings, rows


def explanation(comparison: Comparison) -> list[str]:
    """Return what a reader of the tables has to know, a paragraph each.

    Args:
        comparison: The comparison.
    """
    samples, epochs = comparison.samples_per_epoch, comparison.epochs
    seeds = comparison.config.seeds
    reward = comparison.members[0].config.reward.name
    told = [
        f"Reward: {reward}, mean over the {samples} samples of an epoch. Epoch e is drawn by the "
        f"policy after e epochs of updates, which has learnt from {samples} e reward queries. Each "
        f"variant has {epochs * samples} reward queries a seed; those of the first epoch are the "
        "same samples for all variants.",
    ]
    if len(seeds) > 1:
        told.append(
            f"Mean ± half-width of the {LEVEL:.0%} confidence interval over {len(seeds)} seeds "
            f"({', '.join(map(str, seeds))}), by Student's t (degrees of freedom: "
            f"{len(seeds) - 1}). Gains and differences are taken seed by seed first; equal seeds "
            "draw equal prompts and noise. The intervals are of one variant each, not corrected "
            "for there being several."
        )
    else:
        told.append("One seed: there is no interval, and a difference may be chance.")
    if controls := comparison.config.controls:
        pairs = ", ".join(f"{control} of {name}" for name, control in controls.items())
        told.append(
            "A control trains alike, and is blind to the reward: what it gains, training gives "
            f"without one. Controls: {pairs}."
        )
    if comparison.config.offline:
        told.append(
            f"Offline: epochs 0 to {epochs - 2} are one history, drawn by the untrained policy, "
            f"and epoch {epochs - 1} is drawn by each policy itself, to measure it. After its "
            "first update every variant trains off-policy: ddpo_is is corrected by importance "
            "ratios, which the clip range soon cuts off; ddpo_sf is not corrected; regression "
            "weights the same pictures again."
        )
    return told


def markdown(comparison: Comparison, result: Result) -> str:
    """Return a comparison's page.

    Args:
        comparison: The comparison.
        result: What it found.
    """
    last = result.epochs[-1]
    by_seed: Table = (
        ("variant", *(f"seed {seed}" for seed in comparison.config.seeds)),
        [(v.name, *(f"{row[-1]:.4f}" for row in v.by_seed)) for v in result.variants],
    )
    curve: Table = (
        ("queries", *(each.name for each in result.variants)),
        [
            (str(queries), *(str(each.curve[place]) for each in result.variants))
            for place, queries in enumerate(result.queries)
        ],
    )
    parts = [
        f"# {comparison.name}",
        *explanation(comparison),
        _markdown_table(result_table(comparison, result)),
        f"![Reward against reward queries]({PLOT})",
        "## By reward queries",
        _markdown_table(curve),
        f"## By seed, epoch {last}",
        _markdown_table(by_seed),
    ]
    if result.ratios:
        parts += ["## Importance ratios", _markdown_table(ratio_table(result))]
    return "\n\n".join(parts) + "\n"


def write_report(comparison: Comparison, result: Result, folder: Path) -> list[Path]:
    """Write a comparison's page and its plot.

    Args:
        comparison: The comparison.
        result: What it found.
        folder: Where; made if need be.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / MARKDOWN
    page.write_text(markdown(comparison, result))
    return [page, _draw(comparison, result, folder / PLOT)]


def _draw(comparison: Comparison, result: Result, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    colours = plt.get_cmap("tab10")
    controls = comparison.config.controls
    order = [each.name for each in result.variants if each.name not in controls.values()]
    for each in result.variants:
        # A control has the colour of the first that it controls, and is dashed.
        of = next((name for name, control in controls.items() if control == each.name), None)
        mean = np.asarray([point.mean for point in each.curve])
        half = np.asarray([point.half_width or 0.0 for point in each.curve])
        colour = colours(order.index(of or each.name) % 10)
        line = {"lw": 2, "ls": "--" if of else "-", "marker": "o", "ms": 4}
        axes.fill_between(result.queries, mean - half, mean + half, color=colour, alpha=0.13, lw=0)
        axes.plot(result.queries, mean, color=colour, label=each.name, **line)
    axes.set_title(comparison.name, loc="left", fontsize=13)
    axes.set_xlabel("reward queries learnt from")
    seeds = len(comparison.config.seeds)
    band = f", {LEVEL:.0%} interval over {seeds} seeds" if seeds > 1 else ", one seed"
    axes.set_ylabel(f"{comparison.members[0].config.reward.name}: mean{band}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
    return path


def _markdown_table(table: Table) -> str:
    headings, rows = table
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
