"""A comparison's page: what it says, that nothing in it is foreign, and how it looks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ddpo.analysis.comparison.budgets import at_equal_budget
from ddpo.analysis.comparison.page import _Image, _Row, render
from ddpo.analysis.comparison.plan import Comparison
from ddpo.analysis.comparison.result import Result, compare_curves
from ddpo.analysis.page.thumbnails import thumbnail_uri
from ddpo.basics.images import encode_image
from tests.analysis.browser import SCHEMES, WIDTHS, Scheme, check_appearance, visited
from tests.analysis.test_comparison import comparison
from tests.analysis.test_run_page import HOSTILE, Elements


def planned(folder: Path) -> Comparison:
    """Plan a comparison of which one variant is the control of another."""
    variants = {
        "is": {},
        "shuffled": {"algorithm": {"advantages": {"shuffle": True}}},
        "rwr": {"algorithm": {"type": "rwr"}},
    }
    return comparison(folder, variants=variants, controls={"is": "shuffled"})


def page_of(folder: Path, name: str = "tiny") -> str:
    """Return the page of such a comparison over two seeds."""
    plan = planned(folder)
    names = list(plan.variants)
    curves = {v: [[0.0, n + 1.0], [10.0, n + 12.0]] for n, v in enumerate(names)}
    variants = compare_curves(curves, plan.config.controls)
    costs = {name: [(0.0, n + 1.0), (0.0, n + 1.0)] for n, name in enumerate(names)}
    budgets = (at_equal_budget("forwards", costs, curves),)
    result = Result(epochs=(0, 1), queries=(0, 256), variants=variants, ratios=(), budgets=budgets)
    uri = thumbnail_uri(encode_image(Image.new("RGB", (64, 64), (200, 120, 60))))
    pictures = [_Row(v, [_Image(HOSTILE, uri)] * 4) for v in names]
    return render(replace(plan, name=name), result, pictures)


def test_a_page_says_what_the_comparison_found(tmp_path: Path) -> None:
    found = Elements(page_of(tmp_path))
    names = list(planned(tmp_path).variants)
    assert all(name in found.text for name in names)
    classes = found.values("path", "class")
    lines = [each for each in classes if each.startswith("variant")]
    assert len(lines) == len(names) and classes.count("interval") == len(names)
    assert sum("control" in each for each in lines) == 1
    assert "5.0000 ±" in found.text  # of epoch 0: 0 and 10 of two seeds
    assert "Student's t" in found.text
    assert "1 forwards" in found.text and "(epoch 0.3)" in found.text
    assert found.tags["img"] == 4 * len(names) and all(found.values("img", "alt"))


def test_a_page_holds_no_code_and_needs_no_network(tmp_path: Path) -> None:
    page = page_of(tmp_path, name=HOSTILE)
    found = Elements(page)
    assert found.tags["script"] == 0
    assert HOSTILE in found.text
    assert all(value.startswith("data:") for value in found.values("img", "src"))
    assert not any(name.startswith("on") for _, name, _ in found.attributes)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_can_be_read_on_a_phone_and_in_the_dark(
    tmp_path: Path, scheme: Scheme, width: int
) -> None:
    file = tmp_path / "comparison.html"
    file.write_text(page_of(tmp_path), encoding="utf-8")
    with visited(file, width, scheme) as page:
        check_appearance(page, width, scheme, "path.variant")
        strokes = page.evaluate(
            "[...document.querySelectorAll('path.variant')].map(p => getComputedStyle(p).stroke)"
        )
        assert len(set(strokes)) == len(strokes) - 1
