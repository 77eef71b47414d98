"""The report's numbers, images and titles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ddpo.analysis.history import History
from ddpo.analysis.report import plot_images, report_figure, write_report
from ddpo.config import PicturesConfig
from ddpo_workflow.tasks.pictures import draw_pictures, picture_set
from ddpo_workflow.tasks.start import start
from tests.fold import run_epochs
from tests.recorded import EPOCHS, record_run
from tests.store.store_samples import rollout_rows

LONG = "a hedgehog washing the dishes in a kitchen full of books, in the style of an old master"


def test_the_report_shows_the_rewards_and_images_of_its_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = record_run(tiny_model, tmp_path / "store")
    pictures = picture_set(run, PicturesConfig(prompts=["cat", "dog"], seeds=[0]))
    checkpoints = {0: start.fn(run.handle), EPOCHS: run_epochs(run, EPOCHS)}
    for epoch, checkpoint in checkpoints.items():
        draw_pictures.fn(run.handle, checkpoint, pictures, epoch)

    figure = report_figure(run, pictures.pictures_id)
    curve, *grid = figure.axes

    rewards = [
        np.asarray(History(run).samples(epochs=[epoch])["reward"], np.float64)
        for epoch in range(EPOCHS)
    ]
    (line,) = curve.lines
    expected = [(epoch, values.mean()) for epoch, values in enumerate(rewards)]
    assert np.asarray(line.get_xydata()) == pytest.approx(np.asarray(expected), rel=1e-6)
    (band,) = curve.collections
    corners = {
        (epoch, round(values.mean() + sign * values.std(), 5))
        for epoch, values in enumerate(rewards)
        for sign in (-1, 1)
    }
    assert {(x, round(y, 5)) for x, y in band.get_paths()[0].vertices} == corners
    assert curve.get_title(loc="left") == "mine: jpeg_compressibility"

    assert [axes.get_title() for axes in grid] == ["cat", "dog", "", ""]
    assert [grid[0].get_ylabel(), grid[2].get_ylabel()] == ["before", f"after {EPOCHS}"]
    shown = [np.asarray(axes.images[0].get_array()) for axes in grid]
    assert [image.shape for image in shown] == [(16, 16, 3)] * 4
    assert not np.array_equal(shown[0], shown[1])
    assert not np.array_equal(shown[0], shown[2])  # the same prompt and seed, trained
    plt.close(figure)

    file = write_report(run, pictures.pictures_id, tmp_path / "new" / "report.png")
    with Image.open(file) as image:
        assert image.size == (1100, round(110 * (4.2 + 20 / 2)))


@pytest.mark.parametrize("columns", [1, 2, 4, 8])
@pytest.mark.parametrize("prompt", ["a cat", "a cat washing the dishes", LONG])
def test_a_prompt_stays_above_its_own_image(columns: int, prompt: str) -> None:
    rows = [replace(row, prompt=prompt) for row in rollout_rows(count=columns)]
    figure = plt.figure(figsize=(10, 4.2 + 20 / columns), layout="constrained")
    plot_images(figure, rows, rows, epochs=3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    titles = [axes.title for axes in figure.axes[:columns]]
    assert all(title.get_text().startswith("a ") for title in titles)
    boxes = [title.get_window_extent(canvas.get_renderer()) for title in titles]
    edges = [0.0, *(edge for box in boxes for edge in (box.x0, box.x1)), figure.bbox.width]
    assert edges == sorted(edges)
    plt.close(figure)
