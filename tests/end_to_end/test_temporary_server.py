"""`ddpo train` and `ddpo resume` in fresh processes, with Prefect's temporary server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.entities import Run as MlflowRun
from PIL import Image

from ddpo.basics.digests import sha256_bytes
from ddpo.runs import open_run
from ddpo.store import keys
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH
from ddpo.store.objects import Store
from ddpo_workflow.tasks.tracking.connection import RUN_ID_TAG, connect

LIMIT_S = 900


@pytest.mark.slow
def test_a_run_is_whole_and_once_whatever_is_typed_again(
    tiny_model: Path, tmp_path: Path, command_environment: dict[str, str]
):
    environment = {**command_environment, "PREFECT_HOME": str(tmp_path / "prefect")}
    environment["DDPO_ROOT"] = str(tmp_path / "store")

    def ddpo(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ddpo_workflow.flows.cli", *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["train", "configs/starter.yaml", "--run-id", "night"]
    for setting in (
        f"model={{path: {tiny_model}}}",
        "sampler.steps=2",
        "sampler.window=null",
        "rollouts.samples_per_epoch=4",
        "rollouts.shard_size=2",
        "numerics.sample_batch_size=2",
        "numerics.micro_batch_size=2",
        "numerics.threads=1",
        "algorithm.updates_per_epoch=2",
        "epochs=2",
        f"tracking.uri={uri}",
        "tracking.system_metrics=false",
        f"outputs={tmp_path}/outputs",
    ):
        words += ["--set", setting]

    # A whole run: a summary on the screen, a report, weights, all of the store and of MLflow.
    screen = ddpo(*words)
    for told in ("night", "reward, mean", "report.html", "first epoch", str(tmp_path / "store")):
        assert told.replace(" ", "") in "".join(screen.split())
    with Image.open(tmp_path / "outputs" / "night" / "report.png") as report:
        assert min(report.size) > 300
    assert "night" in (tmp_path / "outputs" / "night" / "report.html").read_text()
    assert list((tmp_path / "outputs" / "night" / "lora").glob("*.safetensors"))
    store = Store.open(str(tmp_path / "store"))
    committed = results(store)
    assert epochs_committed(store) == [0, 1]
    shown = tracked(uri)
    assert shown.info.status == "FINISHED"
    metrics = logged(uri, shown)
    assert metrics["reward/mean"] == [0, 1]
    assert metrics["update/loss"] == [0, 1]

    # The same words again: nothing is redone, nothing is logged twice.
    ddpo(*words)
    assert results(store) == committed
    assert tracked(uri).info.run_id == shown.info.run_id
    assert logged(uri, shown) == metrics

    # One epoch more: what was there stays as it was.
    ddpo("resume", "night", "--epochs", 3)
    longer = results(store)
    assert epochs_committed(store) == [0, 1, 2]
    assert committed.items() < longer.items()
    assert logged(uri, shown) == {
        name: [*steps, 2] if steps == [0, 1] else steps for name, steps in metrics.items()
    }
    assert tracked(uri).info.status == "FINISHED"
    assert open_run(store, "night").config.epochs == 3


def results(store: Store) -> dict[str, str]:
    """The sha256 of all but the records of starts, of which each start adds one."""
    return {
        key: sha256_bytes(store.read(key))
        for key in store.list()
        if not key.startswith(keys.starts_prefix("night"))
    }


def epochs_committed(store: Store) -> list[int]:
    return [e for e in range(5) if EPOCH.commit_of(store, Partition("night", e))]


def tracked(uri: str) -> MlflowRun:
    """The run's one MLflow run."""
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, filter_string=f"tags.`{RUN_ID_TAG}` = 'night'")
    assert len(found) == 1
    return found[0]


def logged(uri: str, run: MlflowRun) -> dict[str, list[int]]:
    """The steps at which each metric was logged."""
    client = connect(uri)
    names = client.get_run(run.info.run_id).data.metrics
    return {
        name: [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        for name in names
    }
