"""Curves as paths of an SVG of 1000x1000 units, which the page stretches to any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
"""An epoch and a value."""

_UNITS = 1000
_MARGIN = 0.06
_MOST_TICKS = 5


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    percent: float
    """From the left or from the top."""
    label: str


@dataclass(frozen=True)
class Axes:
    """The range of values that a chart shows."""

    x: tuple[float, float]
    y: tuple[float, float]

    @staticmethod
    def around(points: Sequence[Point]) -> Axes:
        """Return axes that hold some points (at least one), with a margin above and below."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        # A constant has no height: it is drawn in the middle.
        margin = (high - low) * _MARGIN or abs(high) * _MARGIN or 1.0
        return Axes((min(xs), max(max(xs), min(xs) + 1)), (low - margin, high + margin))

    def left(self, x: float) -> float:
        """Return where a value of the x axis is, in percent from the left."""
        low, high = self.x
        return round(100 * (x - low) / (high - low), 3)

    def top(self, y: float) -> float:
        """Return where a value of the y axis is, in percent from the top."""
        low, high = self.y
        return round(100 * (high - y) / (high - low), 3)

    def line(self, points: Sequence[Point]) -> str:
        """Return a path through points; it is interrupted where a value is not finite."""
        parts, pen = [], "M"
        for x, y in points:
            if math.isfinite(y):
                parts.append(f"{pen}{self._at(x, y)}")
                pen = "L"
            else:
                pen = "M"
        return "".join(parts)

    def band(self, points: Sequence[tuple[float, float, float]]) -> str:
        """Return the outline of a band, given as x, lower and upper edge."""
        found = [point for point in points if all(map(math.isfinite, point))]
        if not found:
            return ""
        outline = [self._at(x, high) for x, _, high in found]
        outline += [self._at(x, low) for x, low, _ in reversed(found)]
        return "M" + "L".join(outline) + "Z"

    def dots(self, points: Sequence[Point]) -> str:
        """Return a path of lines without length: with round ends, dots that are never stretched."""
        return "".join(f"M{self._at(x, y)}h0" for x, y in points if math.isfinite(y))

    def bars(self, points: Sequence[tuple[float, float, float]]) -> str:
        """Return vertical lines, given as x, lower and upper end."""
        return "".join(f"M{self._at(x, low)}L{self._at(x, high)}" for x, low, high in points)

    def y_ticks(self) -> list[Tick]:
        """Return round values of the y axis."""
        return [Tick(self.top(value), f"{value:g}") for value in round_values(*self.y)]

    def x_ticks(self) -> list[Tick]:
        """Return whole numbers of the x axis."""
        values = round_values(*self.x, whole=True)
        return [Tick(self.left(value), f"{value:g}") for value in values]

    def _at(self, x: float, y: float) -> str:
        scale = _UNITS / 100
        return f"{round(self.left(x) * scale, 1):g} {round(self.top(y) * scale, 1):g}"


def round_values(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return up to five multiples of 1, 2 or 5 times a power of ten within a range.

    Args:
        low: The lower end.
        high: The upper end, above it.
        whole: Whether only whole numbers will do.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / _MOST_TICKS))
    steps = [power * factor for factor in (1, 2, 5, 10) if not whole or power * factor >= 1]
    step = next((s for s in steps if (high - low) / s <= _MOST_TICKS), 1.0)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]
