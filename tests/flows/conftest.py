"""A night's run, that forks and rescorings go out from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.night import Place, record_night


@pytest.fixture(scope="module")
def place(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    return record_night(tiny_model, mlflow_database, tmp_path_factory.mktemp("night"))
