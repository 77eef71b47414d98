"""A comparison's report as HTML: one file that needs nothing else, and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpo.analysis.comparison.plan import Comparison, Member
from ddpo.analysis.comparison.report import (
    BUDGETS_EXPLAINED,
    EQUAL_BUDGETS,
    Table,
    budget_table,
    curve_table,
    explanation,
    ratio_table,
    result_table,
    seed_table,
)
from ddpo.analysis.comparison.result import Result, VariantResult
from ddpo.analysis.page.charts import Axes, Point, Tick
from ddpo.analysis.page.template import fill
from ddpo.analysis.page.thumbnails import thumbnail_uri
from ddpo.store.keys import Partition
from ddpo.store.kinds import IMAGES
from ddpo.store.objects import Store

_MOST_IMAGES = 8
_HUES = (212, 28, 140, 330, 52, 265, 180, 0)
"""Of the colors of variants, in degrees: neighbours differ much."""


@dataclass(frozen=True)
class _Line:
    """A variant in the chart."""

    name: str
    path: str
    band: str
    hue: int
    control: bool
    """Whether it is dashed, in the color of the first variant that it controls."""


@dataclass(frozen=True)
class _Chart:
    lines: Sequence[_Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]


@dataclass(frozen=True)
class _Image:
    prompt: str
    uri: str


@dataclass(frozen=True)
class _Row:
    """The images of one variant."""

    name: str
    images: Sequence[_Image]


def write_page(comparison: Comparison, result: Result, store: Store, path: Path) -> Path:
    """Write a comparison's report as an HTML file.

    Args:
        comparison: The comparison.
        result: Its result.
        store: The store of its runs, for their images.
        path: The file to write.

    Returns:
        ``path``.
    """
    path.write_text(render(comparison, result, _pictures(comparison, store)), encoding="utf-8")
    return path


def render(comparison: Comparison, result: Result, pictures: Sequence[_Row] = ()) -> str:
    """Return a comparison's page.

    Args:
        comparison: The comparison.
        result: Its result.
        pictures: Images of each variant.
    """
    seeds, last = comparison.config.seeds, result.epochs[-1]
    tables: dict[str, Table] = {
        "Result": result_table(comparison, result),
        **({EQUAL_BUDGETS: budget_table(result)} if result.budgets else {}),
        "By reward queries": curve_table(result),
        f"By seed, epoch {last}": seed_table(comparison, result),
    }
    if result.ratios:
        tables["Importance ratios"] = ratio_table(result)
    return fill(
        "ddpo.analysis.comparison",
        name=comparison.name,
        paragraphs=[
            *explanation(comparison),
            *([f"{EQUAL_BUDGETS}: {BUDGETS_EXPLAINED}"] if result.budgets else []),
        ],
        chart=_chart(comparison, result),
        tables=tables,
        pictures=pictures,
        seed=seeds[0],
    )


def _chart(comparison: Comparison, result: Result) -> _Chart:
    bands = {variant.name: _band(variant, result.queries) for variant in result.variants}
    ends: list[Point] = [
        (x, y) for band in bands.values() for x, low, high in band for y in (low, high)
    ]
    axes = Axes.around(ends)
    controls = comparison.config.controls
    order = [v.name for v in result.variants if v.name not in controls.values()]
    lines = []
    for variant in result.variants:
        of = next((name for name, control in controls.items() if control == variant.name), None)
        lines.append(
            _Line(
                name=variant.name,
                path=axes.line(
                    [(float(x), y.mean) for x, y in zip(result.queries, variant.curve, strict=True)]
                ),
                band=axes.band(bands[variant.name]),
                hue=_HUES[order.index(of or variant.name) % len(_HUES)],
                control=of is not None,
            )
        )
    return _Chart(lines, axes.x_ticks(), axes.y_ticks())


def _band(variant: VariantResult, queries: Sequence[int]) -> list[tuple[float, float, float]]:
    """Return reward queries, and both ends of the interval of the mean reward."""
    return [
        (float(x), y.mean - (y.half_width or 0.0), y.mean + (y.half_width or 0.0))
        for x, y in zip(queries, variant.curve, strict=True)
    ]


def _pictures(comparison: Comparison, store: Store) -> list[_Row]:
    """Return images of fixed prompts and seeds by each variant's run of the first seed."""
    rows = [
        (name, _last_images(members[0], store)) for name, members in comparison.variants.items()
    ]
    return [_Row(name, images) for name, images in rows if images]


def _last_images(member: Member, store: Store) -> list[_Image]:
    drawn: list[Partition] = IMAGES.partitions_of(store, member.run_id)
    if not drawn:
        return []
    last = max(drawn, key=lambda where: (where.epoch, str(where.images_id)))
    rows = IMAGES.require(store, last).rows()[:_MOST_IMAGES]
    return [_Image(row.prompt, thumbnail_uri(row.image_png)) for row in rows]
