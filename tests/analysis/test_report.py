"""The report's rows of pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ddpo.analysis.report import draw_pictures
from tests.store.store_samples import rollout_rows

LONG = "a hedgehog washing the dishes in a kitchen full of books, in the style of an old master"


@pytest.mark.parametrize("columns", [1, 2, 4, 8])
@pytest.mark.parametrize("prompt", ["a cat", "a cat washing the dishes", LONG])
def test_a_prompt_stays_above_its_own_picture(columns: int, prompt: str) -> None:
    rows = [replace(row, prompt=prompt) for row in rollout_rows(count=columns)]
    figure = plt.figure(figsize=(10, 4.2 + 20 / columns), layout="constrained")
    draw_pictures(figure, rows, rows, epochs=3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    titles = [axes.title for axes in figure.axes[:columns]]
    assert all(title.get_text().startswith("a ") for title in titles)
    boxes = [title.get_window_extent(canvas.get_renderer()) for title in titles]
    edges = [0.0, *(edge for box in boxes for edge in (box.x0, box.x1)), figure.bbox.width]
    assert edges == sorted(edges)
    plt.close(figure)
