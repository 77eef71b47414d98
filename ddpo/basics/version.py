"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("ddpo")  # pyproject.toml has the only number
except PackageNotFoundError:  # a checkout on the path, without `pip install -e .`
    VERSION = "0+not.installed"
