"""Every family through the whole flow: crashes, then all that is done with a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from ddpo.analysis.lora_export import write_export
from ddpo.analysis.lora_plan import plan_export
from ddpo.runs import open_run
from ddpo_workflow.flows.fork import fork
from ddpo_workflow.flows.rescore import rescore
from tests.faults.crashes import RUN, Moment
from tests.faults.test_crash_in_the_flow import InFlow, check_crashes
from tests.sweeps import swept
from tests.tiny_families import FAMILIES, SETTINGS

PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2KleinPipeline",
}
EVALUATION = {"every": 1, "count": 3, "seeds": [0, 1], "kl_samples": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: build(folder / name) for name, build in FAMILIES.items()}


@pytest.mark.parametrize(
    ("name", "crashes"),
    swept(
        [("sdxl", 1), ("flux", 1), *((name, 4) for name in FAMILIES)],
        often=lambda _, crashes: crashes == 1,
    ),
)
def test_a_run_of_any_family_survives_crashes_and_can_be_forked_rescored_and_exported(
    models: Mapping[str, Path], tmp_path: Path, mlflow_database: Path, name: str, crashes: int
) -> None:
    own = SETTINGS[name]
    changes: dict[str, Any] = {
        **own,
        "sampler": {**own["sampler"], "steps": 3},
        "algorithm": {"type": "ddpo_is", "updates_per_epoch": 1, "kl_weight": 0.01},
        "evaluation": EVALUATION,
    }

    def plan(run: str) -> InFlow:
        return InFlow.plan(models[name], tmp_path / run, mlflow_database, **changes)

    def points(made: list[str]) -> list[tuple[int, Moment]]:
        count = len(made)
        spread = [round((point + 0.5) * count / crashes) for point in range(crashes)]
        return [(at, "after" if at % 2 else "before") for at in spread]

    whole = check_crashes(plan, points)
    root = whole.night.store.root
    assert rescore(RUN, "colorfulness", storage=root).startswith("colorfulness-")
    words: dict[str, Any] = {"fork_id": "other", "epochs": 2, "storage": root}
    fork(RUN, 1, reward="colorfulness", statistics="reset", **words)
    run = open_run(whole.night.store, RUN)
    export = plan_export(run, tmp_path / "lora")
    write_export(export)
    card = ModelCard.load(tmp_path / "lora/README.md")
    assert "tags" in yaml.safe_load(card.content.split("---\n")[1])
    assert f"pipeline = {PIPELINES[name]}.from_pretrained" in card.content
    assert ("DDIMScheduler" in card.content) == (name == "sdxl")
