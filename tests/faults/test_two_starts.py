"""The same run started twice at once, in two processes that share all they write to."""

from __future__ import annotations

from pathlib import Path

from tests.faults.crashes import Night
from tests.faults.processes import LIMIT_S, Command, kill


def test_both_of_two_starts_at_once_end_well_and_share_a_page(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "night"
    night = Night.plan(
        tiny_model,
        str(folder / "store"),
        folder,
        mlflow_database,
        outputs=str(folder / "outputs"),
        storage={"root": str(folder / "store")},
    )
    command = Command(night, folder, {})
    processes = [command.start(), command.start()]
    try:
        statuses = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            kill(process)
    screen = command.log.read_text()
    assert statuses == [0, 0], screen
    assert "SQL" not in screen
    assert {step for step, _ in night.metrics()["reward/mean"]} == {0, 1}
