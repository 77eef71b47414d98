"""Crashes at writes of the whole Prefect flow: tasks in threads, retries, exports and all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ddpo.basics.digests import tensors_digest
from ddpo_workflow.flows.train import train
from tests.faults.crashes import RUN, Crash, Moment, Night, Writes, watched

POINTS = 6
AHEAD = "manifests/checkpoints/run_id=night/epoch=00002.json"


@dataclass(frozen=True)
class InFlow:
    """A night's run as `ddpo_workflow.flows.train` runs it, and the folder it writes to."""

    night: Night
    folder: Path

    @classmethod
    def plan(cls, model: Path, folder: Path, database: Path) -> InFlow:
        root, outputs = str(folder / "store"), str(folder / "outputs")
        night = Night.plan(model, root, folder, database, outputs=outputs)
        # What is exported after every epoch is read from a checkpoint that retention may not take.
        tracking = night.config.tracking.model_copy(update={"adapter_every": 1})
        config = night.config.model_copy(update={"tracking": tracking})
        return cls(replace(night, config=config), folder)

    def go(self) -> None:
        """Start the run or go on with it, through Prefect."""
        file = self.folder / "config.yaml"
        file.write_text(self.night.config.model_dump_json())
        train(str(file), RUN)

    def adapter(self) -> str:
        """Return the digest of the weights that were handed over."""
        (file,) = (self.folder / "outputs" / RUN / "lora").glob("*.safetensors")
        return tensors_digest(load_file(file))


@pytest.mark.slow
def test_a_crash_anywhere_in_the_flow_changes_no_byte(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path
) -> None:
    whole = InFlow.plan(tiny_model, tmp_path / "whole", mlflow_database)
    with watched(Writes()) as writes:
        whole.go()
    count = len(writes.made)
    # A checkpoint that is ahead of the last committed epoch.
    ahead = next(i for i, name in enumerate(writes.made, 1) if name.endswith(AHEAD))
    content, metrics, adapter = whole.night.content(), whole.night.metrics(), whole.adapter()
    assert count > 60
    points: list[tuple[int, Moment]] = [(ahead, "after")]
    for point in range(POINTS):
        at = round((point + 0.5) * count / POINTS)
        points.append((at, "after" if point % 2 else "before"))
    for at, moment in points:
        crashed = InFlow.plan(tiny_model, tmp_path / f"crash-{at}", mlflow_database)
        with watched(Writes(at, moment)) as writes, pytest.raises(Crash) as crash:
            crashed.go()
        where = f"{moment} {crash.value}"
        crashed.go()
        assert crashed.night.content() == content, where
        assert crashed.night.metrics().keys() == metrics.keys(), where
        for name, values in metrics.items():
            if not name.startswith("time/"):
                assert crashed.night.metrics()[name] == values, (where, name)
        assert crashed.adapter() == adapter, where
