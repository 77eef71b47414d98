"""Tiny pipelines of every family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.tiny import build_tiny_model
from tests.tiny_families import FAMILIES


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("memory")
    builders = {"sd": build_tiny_model, **FAMILIES}
    return {name: build(folder / name) for name, build in builders.items()}
