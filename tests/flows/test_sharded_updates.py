"""Full fine-tuning by several processes: the bytes of one, also after a kill or a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddpo.store.objects import Store
from ddpo_workflow.tasks.progress import shown_by
from tests.flows.test_engines import Updates, content, killing, train_by

pytestmark = pytest.mark.slow

TWO = {"type": "processes", "workers": 2}
THREE = {"type": "processes", "workers": 3}


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one process leaves after four epochs."""
    folder = tmp_path_factory.mktemp("local")
    return content(trained("local", tiny_model, mlflow_database, folder, epochs=4))


def trained(engine: Any, model: Path, database: Path, folder: Path, *, epochs: int) -> Store:
    whole = {"type": "full"}
    return train_by(engine, model, database, folder / "run", epochs=epochs, trainable=whole)


def test_a_rank_that_is_killed_in_an_update_changes_no_byte(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    updates = Updates()
    with shown_by(updates), killing(lambda: updates.runs) as killed:
        store = trained(TWO, tiny_model, mlflow_database, tmp_path, epochs=2)
    assert killed
    found = content(store)
    assert found.items() <= undisturbed.items()
    assert any("checkpoints" in key and "epoch=00002" in key for key in found)


def test_a_run_resumes_on_another_number_of_processes(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    engines: list[Any] = ["local", TWO, THREE, "local"]
    for epochs, engine in enumerate(engines, start=1):
        store = trained(engine, tiny_model, mlflow_database, tmp_path, epochs=epochs)
    assert content(store) == undisturbed
