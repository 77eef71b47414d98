"""A run of three epochs by the flows, with Prefect's server and MLflow's database around it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from ddpo.basics.digests import tensors_digest
from ddpo.config import RunConfig
from ddpo.runs import Run, open_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.train import train
from ddpo_workflow.tasks.tracking.connection import RUN_ID_TAG
from tests.tiny import tiny_config

EPOCHS = 3
NIGHT = "night"


@dataclass(frozen=True)
class Place:
    """A store with a run of three epochs, and the MLflow database that shows it."""

    store: Store
    uri: str

    def run(self, run_id: str) -> Run:
        return open_run(self.store, run_id)

    def page(self, run_id: str) -> Any:
        client = MlflowClient(self.uri)
        experiments = [e.experiment_id for e in client.search_experiments()]
        (found,) = client.search_runs(
            experiments, filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'"
        )
        return found

    def weights(self, run_id: str, epoch: int) -> str:
        found = CHECKPOINT.commit_of(self.store, Partition(run_id, epoch))
        assert found is not None
        return tensors_digest(CHECKPOINT.load(self.store, found.ref).state().weights)


def record_night(model: Path, database: Path, folder: Path) -> Place:
    """Train for three epochs of eight samples in two shards.

    Args:
        model: The tiny model.
        database: MLflow's, as it is before there is a run.
        folder: Where store and database are to lie.
    """
    shutil.copy(database, folder / "mlflow.db")
    config: RunConfig = tiny_config(
        model,
        prompts={"name": "prompt_list", "parameters": {"prompts": ["a cat", "a dog"]}},
        sampler={"steps": 2},
        rollouts={"samples_per_epoch": 8, "shard_size": 4},
        algorithm={"advantages": {"type": "per_prompt", "buffer_size": 16, "min_count": 4}},
        optimizer={"learning_rate": 1e-2},
        storage={"root": str(folder / "store")},
        tracking={
            "uri": f"sqlite:///{folder}/mlflow.db",
            "pictures": {"prompts": ["a cat"], "seeds": [0]},
        },
        outputs=str(folder / "outputs"),
        epochs=EPOCHS,
    )
    file = folder / "config.yaml"
    file.write_text(config.model_dump_json())
    train(str(file), run_id=NIGHT)
    return Place(Store.open(str(folder / "store")), config.tracking.uri)


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Type a `ddpo` command, which ends well."""
    monkeypatch.setattr("sys.argv", ["ddpo", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
