"""Crashes at writes of the whole Prefect flow: tasks in threads, retries, exports and all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from ddpo.basics.digests import tensors_digest
from ddpo_workflow.flows.train import train
from tests.faults.crashes import RUN, Crash, Moment, Night, Writes, watched
from tests.sweeps import swept

AHEAD = "manifests/checkpoints/run_id=night/epoch=00002.json"


@dataclass(frozen=True)
class InFlow:
    """A night's run as `ddpo_workflow.flows.train` runs it, and the folder it writes to."""

    night: Night
    folder: Path

    @classmethod
    def plan(cls, model: Path, folder: Path, database: Path, /, **changes: Any) -> InFlow:
        root, outputs = str(folder / "store"), str(folder / "outputs")
        night = Night.plan(model, root, folder, database, outputs=outputs, **changes)
        # What is exported after every epoch is read from a checkpoint that retention may not take.
        tracking = night.config.tracking.model_copy(update={"adapter_every": 1})
        config = night.config.model_copy(update={"tracking": tracking})
        return cls(replace(night, config=config), folder)

    def go(self) -> None:
        """Start the run or go on with it, through Prefect."""
        file = self.folder / "config.yaml"
        file.write_text(self.night.config.model_dump_json())
        train(str(file), RUN)

    def champions(self) -> list[tuple[str, str]]:
        """Return name and epoch of each version in MLflow's registry that is a champion."""
        client = MlflowClient(self.night.config.tracking.uri)
        versions = client.search_model_versions()
        marked = [
            client.get_model_version_by_alias(each.name, "champion")
            for each in client.search_registered_models()
        ]
        assert len(versions) == len(marked)
        return [(each.name, each.tags["ddpo.epoch"]) for each in marked]

    def adapter(self) -> str:
        """Return the digest of the weights that were handed over."""
        (file,) = (self.folder / "outputs" / RUN / "lora").glob("*.safetensors")
        return tensors_digest(load_file(file))


def check_crashes(
    plan: Callable[[str], InFlow], points: Callable[[list[str]], list[tuple[int, Moment]]]
) -> InFlow:
    """Crash a run at some of the writes that a whole one makes; it ends as the whole one did.

    Returns the whole one.
    """
    whole = plan("whole")
    with watched(Writes()) as writes:
        whole.go()
    content, metrics, adapter = whole.night.content(), whole.night.metrics(), whole.adapter()
    champions = whole.champions()
    for at, moment in points(writes.made):
        crashed = plan(f"crash-{at}-{moment}")
        with watched(Writes(at, moment)), pytest.raises(Crash) as crash:
            crashed.go()
        where = f"{moment} {crash.value}"
        crashed.go()
        assert crashed.night.content() == content, where
        assert crashed.night.metrics().keys() == metrics.keys(), where
        for name, values in metrics.items():
            if not name.startswith("time/"):
                assert crashed.night.metrics()[name] == values, (where, name)
        assert crashed.adapter() == adapter, where
        assert crashed.champions() == champions, where
    return whole


NFT = {
    "type": "nft",
    "advantages": {"type": "batch"},
    "old_decay": {"per_step": 0.3, "most": 0.9},
}
DPO = {"type": "dpo", "beta": 100.0}
SHARDS = {"samples_per_epoch": 4, "shard_size": 2}
PAIRS = {**SHARDS, "samples_per_prompt": 2}


RUNS: dict[str, dict[str, Any]] = {
    "ddpo_is": {},
    "nft": {"algorithm": NFT},
    "dpo": {"algorithm": DPO, "rollouts": PAIRS},
    "ahead": {"rollouts": {**SHARDS, "sample_ahead": True}, "epochs": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "crashes"),
    swept(
        [("ddpo_is", 2), ("nft", 1), ("ahead", 2), *((name, 8) for name in RUNS)],
        often=lambda _, crashes: crashes < 8,
    ),
)
def test_a_crash_anywhere_in_the_flow_changes_no_byte(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path, name: str, crashes: int
) -> None:
    def plan(run: str) -> InFlow:
        return InFlow.plan(tiny_model, tmp_path / run, mlflow_database, **RUNS[name])

    def points(made: list[str]) -> list[tuple[int, Moment]]:
        count = len(made)
        assert count > 60
        # A checkpoint that is ahead of the last committed epoch.
        ahead = next(i for i, name in enumerate(made, 1) if name.endswith(AHEAD))
        spread: list[tuple[int, Moment]] = [
            (round((point + 0.5) * count / crashes), "after" if point % 2 else "before")
            for point in range(crashes)
        ]
        return list(dict.fromkeys([(ahead, "after"), *spread]))  # they may coincide

    check_crashes(plan, points)


@pytest.mark.slow
@pytest.mark.parametrize("moments", swept([(1,), (3,)], often=lambda moments: moments == 1))
def test_a_crash_within_an_evaluation_changes_no_byte(
    tiny_model: Path, tmp_path: Path, mlflow_database: Path, moments: int
) -> None:
    """Retention keeps one checkpoint alone, the evaluated one for as long as it is needed."""
    evaluation = {
        "every": 1,
        "count": 3,
        "seeds": [0],
        "rewards": [{"name": "colorfulness"}],
        "kl_samples": 1,
    }

    def plan(name: str) -> InFlow:
        folder = tmp_path / name
        return InFlow.plan(tiny_model, folder, mlflow_database, evaluation=evaluation)

    def points(made: list[str]) -> list[tuple[int, Moment]]:
        found = [i for i, name in enumerate(made, 1) if "evaluations/" in name]
        summaries = [i for i in found if "manifests/evaluations/summaries" in made[i - 1]]
        assert len(summaries) == 3
        # The summary of a checkpoint that retention then takes; the first image; a score.
        taken: list[tuple[int, Moment]] = [
            (summaries[1], "before"),
            (found[1], "after"),
            (found[len(found) // 2], "before"),
        ]
        return taken[:moments]

    check_crashes(plan, points)


NO_LIMIT = {
    "statistics": [],
    "least_diversity": None,
    "most_kl": None,
    "most_clipped": None,
    "most_constant": None,
}


ENDING = {**NO_LIMIT, "most_kl": 1e-12, "then": "stop"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "made_of", "moments"),
    swept(
        [(NO_LIMIT, "champions", 1), (ENDING, "decisions", 4), (NO_LIMIT, "champions", 4)],
        often=lambda _gate, _made_of, moments: moments == 1,
    ),
)
def test_a_crash_of_gate_or_champion_changes_no_byte_and_leaves_one_alias(
    tiny_model: Path,
    tmp_path: Path,
    mlflow_database: Path,
    gate: dict[str, Any],
    made_of: str,
    moments: int,
) -> None:
    evaluation = {"every": 1, "count": 3, "seeds": [0], "kl_samples": 1, "gate": gate}

    def plan(name: str) -> InFlow:
        folder = tmp_path / name
        return InFlow.plan(tiny_model, folder, mlflow_database, evaluation=evaluation)

    def points(made: list[str]) -> list[tuple[int, Moment]]:
        object_, manifest = (
            i for i, name in enumerate(made, 1) if f"evaluations/{made_of}" in name
        )
        assert manifest < len(made)  # the weights are logged, and exported, after it
        # The last write records the end, when all is logged.
        taken: list[tuple[int, Moment]] = [
            (manifest, "after"),
            (object_, "before"),
            (manifest, "before"),
            (len(made), "before"),
        ]
        return taken[:moments]

    check_crashes(plan, points)
