"""A run's page as HTML: one file that needs nothing else, and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

from ddpo.analysis.evaluation.summary import labels_in, score_text
from ddpo.analysis.page.charts import Axes, Point, Tick
from ddpo.analysis.page.content import (
    Content,
    Evaluated,
    Pictures,
    PromptRewards,
    own_labels,
    read_content,
)
from ddpo.analysis.page.template import fill, format_number
from ddpo.analysis.page.thumbnails import even
from ddpo.analysis.rewards import remarks
from ddpo.basics.redaction import hide_credentials
from ddpo.config.yaml_text import write_yaml
from ddpo.runs import Run

_MOST_PROMPTS = 100
_MOST_POINTS = 1000
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Command:
    """A command that a reader may want next."""

    purpose: str
    line: str


@dataclass(frozen=True)
class _Evaluation:
    """What a chart shows of an evaluation: the run's own reward by checkpoint."""

    dots: str
    bars: str


@dataclass(frozen=True)
class _Curve:
    """The chart of the rewards."""

    line: str
    band: str
    evaluation: _Evaluation | None
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    first: float
    """Epoch at the left edge."""
    last: float
    """Epoch at the right edge."""


@dataclass(frozen=True)
class _Small:
    """A small chart of one metric."""

    name: str
    line: str
    low: str
    high: str
    last: str


@dataclass(frozen=True)
class _Table:
    """A table of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    alarms: Sequence[str]
    """What looks wrong with the last row."""


def write_page(run: Run, path: Path, commands: Sequence[Command] = ()) -> Path:
    """Write a run's page as an HTML file.

    Args:
        run: The run.
        path: The file to write; its folder is created if needed.
        commands: What a reader may want to type next.

    Returns:
        ``path``.

    Raises:
        NotInHistory: The run has not committed an epoch.
        StoreError: An object is damaged or missing.
    """
    page = render(read_content(run), commands)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def render(content: Content, commands: Sequence[Command] = ()) -> str:
    """Return a run's page.

    Args:
        content: What it says.
        commands: What a reader may want to type next.
    """
    first, last = content.curve[0], content.curve[-1]
    prompts = chosen_prompts(content.prompts)
    return fill(
        "ddpo.analysis.page",
        run=content,
        first=first,
        last=last,
        signed=lambda value: f"{value:+.4g}",
        epochs_trained=epochs_trained,
        curve=_curve(content),
        remarks=remarks(content.curve),
        small=[_small(name, points) for name, points in content.metrics.items()],
        slides=_slides(content),
        prompts=prompts,
        prompts_total=len(content.prompts),
        evaluations=[_evaluation_table(content, each) for each in content.evaluations],
        cost=_cost(content),
        facts={name: hide_credentials(value) for name, value in content.facts.items()},
        identity=hide_credentials(write_yaml(dict(content.identity))),
        operation=hide_credentials(write_yaml(dict(content.operation))),
        commands=commands,
    )


def epochs_trained(epochs: int) -> str:
    """Return how a checkpoint is called."""
    return "before training" if epochs == 0 else f"after {epochs} epoch{'s' * (epochs > 1)}"


def chosen_prompts(prompts: Sequence[PromptRewards]) -> list[PromptRewards]:
    """Return prompts by their gain; of very many, those that gained and those that lost most."""
    ranked = sorted(prompts, key=lambda each: (each.first - each.last, each.prompt))
    if len(ranked) <= _MOST_PROMPTS:
        return ranked
    half = _MOST_PROMPTS // 2
    return [*ranked[:half], *ranked[-half:]]


def _curve(content: Content) -> _Curve:
    means = [(float(each.epoch), each.mean) for each in content.curve]
    spread = [(float(e.epoch), e.mean - e.std, e.mean + e.std) for e in content.curve]
    scored = _own_scores(content)
    every: list[Point] = [
        *means,
        *((x, end) for x, low, high in spread for end in (low, high)),
        *((x, end) for x, mean, low, high in scored for end in (mean, low, high)),
    ]
    finite = [point for point in every if isfinite(point[1])] or [(means[0][0], 0.0)]
    axes = Axes.around([*finite, (means[-1][0], finite[-1][1])])
    evaluation = None
    if scored:
        evaluation = _Evaluation(
            axes.dots([(x, mean) for x, mean, _, _ in scored]),
            axes.bars([(x, low, high) for x, _, low, high in scored]),
        )
    return _Curve(
        line=axes.line(even(means, _MOST_POINTS)),
        band=axes.band(even(spread, _MOST_POINTS)),
        evaluation=evaluation,
        x_ticks=axes.x_ticks(),
        y_ticks=axes.y_ticks(),
        first=axes.x[0],
        last=axes.x[1],
    )


def _own_scores(content: Content) -> list[tuple[float, float, float, float]]:
    """Return epoch, mean, and interval of the run's own reward in its first evaluation."""
    if not content.evaluations:
        return []
    found = []
    for epoch, metrics in content.evaluations[0].checkpoints:
        for label in own_labels(content.reward, content.reward_id):
            if (mean := metrics.get(f"{label}/mean")) is not None:
                gain = metrics.get(f"{label}/gain", nan)
                half = metrics.get(f"{label}/gain_high", nan) - gain
                half = half if isfinite(half) else 0.0
                found.append((float(epoch), mean, mean - half, mean + half))
    return found


def _small(name: str, points: Sequence[tuple[int, float]]) -> _Small:
    finite = [(float(x), y) for x, y in points if isfinite(y)]
    line = ""
    if finite:
        axes = Axes.around([*finite, (float(points[-1][0]), finite[-1][1])])
        line = axes.line(even([(float(x), y) for x, y in points], _MOST_POINTS))
    values = [y for _, y in finite]
    return _Small(
        name=name.replace("_", " "),
        line=line,
        low=format_number(min(values, default=None)),
        high=format_number(max(values, default=None)),
        last=format_number(points[-1][1]),
    )


def _slides(content: Content) -> dict[str, Any] | None:
    """Return what the slider shows, for the page's script; None without images."""
    pictures: Pictures | None = content.pictures
    if pictures is None:
        return None
    means = {each.epoch: each.mean for each in content.curve}
    return {
        "steps": [
            {
                "epoch": step.epoch,
                "label": epochs_trained(step.epoch),
                "mean": format_number(means.get(step.epoch)),
                "images": step.images,
            }
            for step in pictures.steps
        ]
    }


def _evaluation_table(content: Content, evaluated: Evaluated) -> _Table:
    """Return mean and gain of each reward, then what the images are like, by checkpoint."""
    names = list(dict.fromkeys(name for _, found in evaluated.checkpoints for name in found))
    found = {label for _, metrics in evaluated.checkpoints for label in labels_in(metrics)}
    labels = sorted(
        found, key=lambda label: (label not in own_labels(content.reward, content.reward_id), label)
    )
    others = [name for name in names if not any(name.startswith(f"{each}/") for each in labels)]
    rows = [
        [
            str(epoch),
            *(score_text(metrics, label) for label in labels),
            *(format_number(metrics.get(name)) for name in others),
        ]
        for epoch, metrics in evaluated.checkpoints
    ]
    shown = [name.removeprefix("images/").replace("_", " ") for name in others]
    title = f"{evaluated.weights} weights"
    if sum(each.weights == evaluated.weights for each in content.evaluations) > 1:
        title += f", set {evaluated.set_id}"
    return _Table(title, ["epochs", *labels, *shown], rows, evaluated.alarms)


def _cost(content: Content) -> dict[str, str]:
    queries = sum(each.samples for each in content.curve)
    queries_by_evaluations = sum(each.scores for each in content.evaluations)
    cost = {"Samples scored in training": f"{queries:,}"}
    if queries_by_evaluations:
        cost["Scores of evaluations"] = f"{queries_by_evaluations:,}"
    if content.epoch_s is not None:
        cost["Time an epoch"] = f"{format_duration(content.epoch_s)} (median between commits)"
        whole = format_duration(content.epoch_s * len(content.curve))
        cost[f"Time of {len(content.curve)} epochs"] = f"about {whole}"
    if content.device is not None:
        more = "" if content.device.whole else "at least "
        seconds = content.device.seconds
        cost["Device time"] = (
            f"{more}{seconds:,.0f} device seconds ({format_duration(seconds)}), "
            "from the start of each process to its end or last commit"
        )
    folders = sorted(content.stored.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in folders)
    cost["In the store"] = f"{format_bytes(sum(content.stored.values()))} ({parts})"
    return cost


def format_bytes(size: float) -> str:
    """Return a number of bytes in the largest unit that leaves a whole number before the point."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if unit else f"{size} bytes"


def format_duration(seconds: float) -> str:
    """Return seconds, minutes or hours, whichever are readable."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
