"""Fill a page's template: everything is in the one file, and text is escaped."""

from __future__ import annotations

from importlib.resources import files
from math import isfinite
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ddpo.basics.version import VERSION


def fill(package: str, **values: Any) -> str:
    """Return the page that a package's ``page.html`` makes of some values.

    Args:
        package: The package; the style is that of `ddpo.analysis.page`.
        values: The template's variables.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_text(package, "page.html"))
    style = Markup(_text("ddpo.analysis.page", "style.css"))
    return template.render(style=style, version=VERSION, number=format_number, **values)


def format_number(value: float | None) -> str:
    """Return a number with four digits, or a dash if there is none."""
    return "–" if value is None or not isfinite(value) else f"{value:.4g}"


def _text(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
