"""One process, two, or one an epoch: where a run is interrupted makes no difference."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.crashes import Night
from tests.sweeps import swept

EPOCHS = 4
LIMIT_S = 900


@pytest.mark.slow
@pytest.mark.parametrize("epochs_a_process", swept([(2,), (1,)], often=lambda epochs: epochs == 2))
def test_four_epochs_are_the_same_in_one_process_and_in_several(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path, epochs_a_process: int
) -> None:
    straight, parted = (
        Night.plan(
            tiny_model,
            str(tmp_path / name / "store"),
            tmp_path / name,
            mlflow_database,
            epochs=EPOCHS,
            storage={"root": str(tmp_path / name / "store")},
        )
        for name in ("straight", "parted")
    )
    straight.go()
    spawn = multiprocessing.get_context("spawn")
    for until in range(epochs_a_process, EPOCHS + 1, epochs_a_process):
        part = replace(parted, config=parted.config.model_copy(update={"epochs": until}))
        process = spawn.Process(target=Night.go, args=(part,))
        process.start()
        process.join(LIMIT_S)
        assert process.exitcode == 0, f"epochs up to {until}"
    content = straight.content()
    assert len([key for key in content if key.startswith("manifests/epochs/")]) == EPOCHS
    assert parted.content() == content
    assert parted.metrics() == straight.metrics()
