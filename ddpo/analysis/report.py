"""A run's report: reward by epoch, and the same prompts and seeds before and after training."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ddpo.analysis.rewards import reward_curve
from ddpo.basics.images import decode_image
from ddpo.runs import Run
from ddpo.store.keys import Partition
from ddpo.store.kinds import IMAGES
from ddpo.store.tables import RolloutRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

_MAX_IMAGES = 8
_CHARACTERS = 140
"""How many characters of a title fit side by side into the width of the figure."""


class CurvePoint(Protocol):
    """The rewards of an epoch."""

    @property
    def epoch(self) -> int:
        """The epoch."""
        ...

    @property
    def mean(self) -> float:
        """Mean over its samples."""
        ...

    @property
    def std(self) -> float:
        """Standard deviation over its samples."""
        ...


def checkpoint_pictures(run: Run, pictures_id: str, epoch: int) -> list[RolloutRow]:
    """Read a checkpoint's images of the fixed prompts and seeds; none if not committed.

    Args:
        run: The run.
        pictures_id: The set of fixed prompts and seeds.
        epoch: Number of epochs trained.
    """
    images = IMAGES.get(run.store, Partition(run.run_id, epoch, images_id=pictures_id))
    return images.rows() if images else []


def write_report(run: Run, pictures_id: str, path: Path) -> Path:
    """Write a run's report as a PNG file.

    Args:
        run: The run.
        pictures_id: The set of fixed prompts and seeds to show.
        path: The file to write; its folder is created if needed.

    Returns:
        ``path``.
    """
    figure = report_figure(run, pictures_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")
    return path


def report_figure(run: Run, pictures_id: str) -> Figure:
    """Plot a run's report: mean reward by epoch with its spread, and images before and after."""
    from matplotlib.figure import Figure

    curve = reward_curve(run)
    before = checkpoint_pictures(run, pictures_id, run.first_epoch)[:_MAX_IMAGES]
    last = run.first_epoch + len(curve)
    after = checkpoint_pictures(run, pictures_id, last)[:_MAX_IMAGES]
    columns = max(len(before), 1)
    heights = [4.2, 2 * 10 / columns]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    title = f"{run.run_id}: {run.config.reward.name}"
    _plot_curve(upper.subplots(), curve, title)
    plot_images(lower, before, after, last)
    return figure


def _plot_curve(axes: Axes, curve: Sequence[CurvePoint], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [point.epoch for point in curve]
    mean = np.asarray([point.mean for point in curve])
    std = np.asarray([point.std for point in curve])
    axes.fill_between(epochs, mean - std, mean + std, color="#4c78a8", alpha=0.18, lw=0)
    axes.plot(epochs, mean, color="#4c78a8", lw=2, marker="o", ms=4)
    axes.set_title(title, loc="left", fontsize=13, parse_math=False)
    axes.set_xlabel("epoch")
    axes.set_ylabel("reward: mean and standard deviation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def save_curve(curve: Sequence[CurvePoint], title: str, path: Path) -> None:
    """Write a small picture of mean reward by epoch as a PNG file. Safe to call from any thread.

    Args:
        curve: The rewards by epoch.
        title: The picture's.
        path: The file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    _plot_curve(figure.subplots(), curve, title)
    figure.savefig(path, dpi=100, facecolor="white")


def plot_images(
    figure: FigureBase, before: Sequence[RolloutRow], after: Sequence[RolloutRow], epochs: int
) -> None:
    """Plot images in two rows, with each column's prompt above it.

    Args:
        figure: The figure to plot into.
        before: The upper row.
        after: The lower row, for the same prompts.
        epochs: Epochs trained before the lower row.
    """
    columns = max(len(before), 1)
    grid = figure.subplots(2, columns, squeeze=False)
    for row, (rows, label) in enumerate(((before, "before"), (after, f"after {epochs}"))):
        for column in range(columns):
            axes = grid[row][column]
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if column < len(rows):
                image = decode_image(rows[column].image_png)
                axes.imshow(image, interpolation="nearest")
                if row == 0:
                    title = _wrapped(rows[column].prompt, columns)
                    axes.set_title(title, fontsize=9, parse_math=False)
        grid[row][0].set_ylabel(label, fontsize=11)


def _wrapped(prompt: str, columns: int) -> str:
    width = _CHARACTERS // columns - 2
    return textwrap.fill(prompt, width, max_lines=3, placeholder=" …")
