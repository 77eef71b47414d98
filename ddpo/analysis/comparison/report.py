"""A comparison's report: tables in Markdown, and a plot of reward against reward queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpo.analysis.comparison.plan import Comparison
from ddpo.analysis.comparison.result import Result
from ddpo.analysis.intervals import LEVEL, Interval

MARKDOWN = "comparison.md"
PLOT = "comparison.png"
EQUAL_BUDGETS = "At equal budgets"
BUDGETS_EXPLAINED = (
    "The mean reward where each variant has spent what the cheapest one spends in all its epochs, "
    "interpolated between epochs. A forward is one image through the network, in sampling or in an "
    "update; an update's backward pass is not counted. Seconds are the median between two commits "
    "of a run: they hold for runs that had the machine to themselves."
)

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Column headings, and rows with one cell per column."""


def result_table(comparison: Comparison, result: Result) -> Table:
    """Return the table of each variant's rewards, gain and differences."""
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
            variant.name,
            str(variant.curve[0]),
            str(variant.curve[-1]),
            str(variant.gain),
            _or_blank(variant.difference),
            *([_or_blank(variant.beyond_control)] if comparison.config.controls else []),
        )
        for variant in result.variants
    ]
    return headings, rows


def _or_blank(value: Interval | None) -> str:
    return "" if value is None else str(value)


def ratio_table(result: Result) -> Table:
    """Return the table of importance ratios on a shared history; it has no rows without one."""
    headings = ("variant", "epoch", "ratio, mean", "smallest", "largest", "clip fraction")
    rows = [
        (
            row.variant,
            str(row.epoch),
            *(f"{v:.5g}" for v in (row.mean, row.smallest, row.largest, row.clip_fraction)),
        )
        for row in result.ratios
    ]
    return headings, rows


def budget_table(result: Result) -> Table:
    """Return the table of each variant's mean reward at equal budgets; no rows without one."""
    headings = ("variant", *(f"{budget.amount:,.0f} {budget.unit}" for budget in result.budgets))
    rows = [
        (
            variant.name,
            *(
                f"{spent.reward} (epoch {spent.epochs:.1f})"
                for spent in (budget.variants[variant.name] for budget in result.budgets)
            ),
        )
        for variant in result.variants
    ]
    return headings, rows if result.budgets else []


def curve_table(result: Result) -> Table:
    """Return the table of each variant's mean reward by reward queries."""
    rows = [
        (str(queries), *(str(variant.curve[index]) for variant in result.variants))
        for index, queries in enumerate(result.queries)
    ]
    return ("queries", *(variant.name for variant in result.variants)), rows


def seed_table(comparison: Comparison, result: Result) -> Table:
    """Return the table of each variant's mean reward in the last epoch, by seed."""
    rows = [(v.name, *(f"{row[-1]:.4f}" for row in v.by_seed)) for v in result.variants]
    return ("variant", *(f"seed {seed}" for seed in comparison.config.seeds)), rows


def explanation(comparison: Comparison) -> list[str]:
    """Return the paragraphs that explain the tables."""
    samples, epochs = comparison.samples_per_epoch, comparison.epochs
    seeds = comparison.config.seeds
    reward = comparison.members[0].config.reward.name
    paragraphs = [
        f"Reward: {reward}, mean over the {samples} samples of an epoch. Epoch e is sampled by the "
        f"policy after e epochs of updates, which has learned from {samples} e reward queries. "
        f"Each variant has {epochs * samples} reward queries per seed; the samples of the first "
        "epoch are shared by all variants.",
    ]
    if len(seeds) > 1:
        paragraphs.append(
            f"Mean ± half-width of the {LEVEL:.0%} confidence interval over {len(seeds)} seeds "
            f"({', '.join(map(str, seeds))}), by Student's t with {len(seeds) - 1} degrees of "
            "freedom. Gains and differences are taken seed by seed first; equal seeds mean equal "
            "prompts and noise. The intervals are for one variant at a time and not corrected for "
            "multiple comparisons."
        )
    else:
        paragraphs.append("One seed: there is no interval, and a difference may be chance.")
    if controls := comparison.config.controls:
        pairs = ", ".join(f"{control} of {name}" for name, control in controls.items())
        paragraphs.append(
            "A control trains like its variant but does not see the reward, so its gain is what "
            f"training achieves without one. Controls: {pairs}."
        )
    if comparison.config.offline:
        paragraphs.append(
            f"Offline: epochs 0 to {epochs - 2} are one shared history, sampled by the untrained "
            f"policy, and epoch {epochs - 1} is sampled by each policy itself to measure it. After "
            "its first update every variant trains off-policy: ddpo_is is corrected by importance "
            "ratios, which the clip range soon cuts off; ddpo_sf is not corrected; regression "
            "weights the same images again."
        )
    return paragraphs


def markdown(comparison: Comparison, result: Result) -> str:
    """Return a comparison's report in Markdown."""
    last = result.epochs[-1]
    parts = [
        f"# {comparison.name}",
        *explanation(comparison),
        _markdown_table(result_table(comparison, result)),
        f"![Reward against reward queries]({PLOT})",
        *_equal_budgets(result),
        "## By reward queries",
        _markdown_table(curve_table(result)),
        f"## By seed, epoch {last}",
        _markdown_table(seed_table(comparison, result)),
    ]
    if result.ratios:
        parts += ["## Importance ratios", _markdown_table(ratio_table(result))]
    return "\n\n".join(parts) + "\n"


def _equal_budgets(result: Result) -> list[str]:
    if not result.budgets:
        return []
    return [f"## {EQUAL_BUDGETS}", BUDGETS_EXPLAINED, _markdown_table(budget_table(result))]


def write_report(comparison: Comparison, result: Result, folder: Path) -> list[Path]:
    """Write a comparison's report and plot into a folder, created if needed; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / MARKDOWN
    page.write_text(markdown(comparison, result), encoding="utf-8")
    return [page, _draw(comparison, result, folder / PLOT)]


def _draw(comparison: Comparison, result: Result, path: Path) -> Path:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab10"]
    controls = comparison.config.controls
    order = [v.name for v in result.variants if v.name not in controls.values()]
    for variant in result.variants:
        # A control is dashed, in the color of the first variant that it controls.
        of = next((name for name, control in controls.items() if control == variant.name), None)
        mean = np.asarray([point.mean for point in variant.curve])
        half = np.asarray([point.half_width or 0.0 for point in variant.curve])
        color = colors(order.index(of or variant.name) % 10)
        line = {"lw": 2, "ls": "--" if of else "-", "marker": "o", "ms": 4}
        axes.fill_between(result.queries, mean - half, mean + half, color=color, alpha=0.13, lw=0)
        axes.plot(result.queries, mean, color=color, label=variant.name, **line)
    axes.set_title(comparison.name, loc="left", fontsize=13)
    axes.set_xlabel("reward queries learned from")
    seeds = len(comparison.config.seeds)
    band = f", {LEVEL:.0%} interval over {seeds} seeds" if seeds > 1 else ", one seed"
    axes.set_ylabel(f"{comparison.members[0].config.reward.name}: mean{band}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(frameon=False, loc="outside right center")  # beside any number of curves
    figure.savefig(path, dpi=110, facecolor="white")
    return path


def _markdown_table(table: Table) -> str:
    headings, rows = table
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
