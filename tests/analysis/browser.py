"""Look at a page as people do: in Chromium, at a width, in light or in dark mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

Scheme = Literal["light", "dark"]

WIDTHS = (390, 1280)
"""A phone's and a desktop's, in pixels."""
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
DARK_GROUND = "rgb(21, 23, 27)"

# Contrast ratios of the Web Content Accessibility Guidelines 2.2: of text (1.4.3), and of the lines
# of a chart (1.4.11).
LEAST_OF_TEXT = 4.5
LEAST_OF_LINES = 3.0

_CONTRASTS = """
selector => {
  const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (color, ground) => {
    brush.fillStyle = `rgb(${ground})`; brush.fillRect(0, 0, 1, 1);
    brush.fillStyle = color; brush.fillRect(0, 0, 1, 1);
    return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const groundOf = element => element
    ? over(getComputedStyle(element).backgroundColor, groundOf(element.parentElement))
    : [255, 255, 255];
  const luminance = color => color
    .map(level => level / 255)
    .map(level => level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4)
    .reduce((sum, level, channel) => sum + level * [0.2126, 0.7152, 0.0722][channel], 0);
  const ratio = (color, element) => {
    const ground = groundOf(element);
    const [dark, light] = [over(color, ground), ground].map(luminance).sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  if (selector) return [...document.querySelectorAll(selector)].map(
    line => [line.getAttribute("class") || line.tagName, ratio(getComputedStyle(line).stroke, line)]
  );
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode, element = text.parentElement;
    if (text.data.trim() && element.checkVisibility())
      found.push([text.data.trim(), ratio(getComputedStyle(element).color, element)]);
  }
  return found;
}
"""


@contextmanager
def visited(file: Path, width: int, scheme: Scheme) -> Iterator[Page]:
    """Open a file, and check at the end that it asked for nothing else and reported nothing.

    Args:
        file: An HTML file.
        width: Of the window, in pixels.
        scheme: What the reader prefers.
    """
    pytest.importorskip("playwright", reason="playwright is not installed")
    from bench import screenshots

    if screenshots.find_browser() is None:
        pytest.skip("no Chromium on the PATH")
    with screenshots.open_browser() as context:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 844})
        page.goto(file.as_uri())
        yield page
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


def check_appearance(page: Page, width: int, scheme: Scheme, lines: str) -> None:
    """Check that nothing is wider than the window, every image is shown, and all can be read.

    Args:
        page: The page.
        width: Of the window, in pixels.
        scheme: What the reader prefers.
        lines: CSS selector of the lines of its charts.
    """
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == DARK_GROUND) == (scheme == "dark")
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    for selector, least in (("", LEAST_OF_TEXT), (lines, LEAST_OF_LINES)):
        found = page.evaluate(_CONTRASTS, selector)
        assert len(found) > 2
        assert [each for each in found if each[1] < least] == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
