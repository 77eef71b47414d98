"""What a person finds first in MLflow: the kind of experiment, the list, the description."""

from __future__ import annotations

import csv
import getpass
import json
import shutil
import subprocess
from pathlib import Path

import PIL.Image
import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from ddpo.config import RunConfig
from ddpo.runs import Run, start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH, IMAGES
from ddpo_workflow.tasks.pictures import picture_set
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.catch_up import track_missing
from ddpo_workflow.tasks.tracking.page import open_page
from ddpo_workflow.tasks.tracking.tracker import RunTracker
from tests.fold import as_in_a_new_process, run_epoch
from tests.tiny import tiny_config

NOTE = "mlflow.note.content"
KIND = "mlflow.experimentKind"
EPOCHS = 3


@pytest.fixture
def uri(tmp_path: Path, mlflow_database: Path) -> str:
    (tmp_path / "tracking").mkdir()
    shutil.copy(mlflow_database, tmp_path / "tracking" / "mlflow.db")
    return f"sqlite:///{tmp_path}/tracking/mlflow.db"


@pytest.fixture
def config(tiny_model: Path, uri: str, tmp_path: Path) -> RunConfig:
    return tiny_config(
        tiny_model,
        prompts={"name": "prompt_list", "parameters": {"prompts": ["a cat", "a dog"]}},
        sampler={"steps": 2},
        rollouts={"samples_per_epoch": 8, "shard_size": 4},
        storage={"root": str(tmp_path / "store")},
        tracking={"uri": uri, "pictures": {"prompts": ["a cat"], "seeds": [0]}},
        outputs=str(tmp_path / "outputs"),
        epochs=EPOCHS,
    )


def shown(uri: str, page: RunTracker) -> MlflowRun:
    return MlflowClient(uri).get_run(page.mlflow_run_id)


def note(uri: str, page: RunTracker) -> str:
    return shown(uri, page).data.tags.get(NOTE, "")


def opened(uri: str, **changes: str) -> RunTracker:
    settings = {"experiment": "ddpo", "run_id": "night", "uid": "1a2b", **changes}
    return RunTracker.open(tracking_uri=uri, params={"reward": "ocr"}, tags={}, **settings)


def trained(config: RunConfig, epochs: int) -> tuple[Run, RunTracker]:
    """Train a new run of the name `night`, from the first epoch."""
    as_in_a_new_process()
    run = start_run(config, "night")
    page = open_page(run, "ddpo resume night")
    checkpoint = start.fn(run.handle)
    for epoch in range(epochs):
        checkpoint = run_epoch(run, checkpoint, epoch, page.handle)
    return run, page


@pytest.mark.parametrize("kind", [None, "no_inferred_type", "genai_development_inferred"])
def test_an_experiment_is_for_model_training_and_has_a_view_with_the_reward(
    uri: str, kind: str | None
) -> None:
    client = MlflowClient(uri)
    client.create_experiment("ddpo", tags={KIND: kind} if kind else {})
    for _ in range(2):
        page = opened(uri)
    tags = client.get_experiment(page.experiment_id).tags
    assert tags[KIND] == "custom_model_development"
    (view,) = [value for key, value in tags.items() if key.startswith("mlflow.sharedViewState.")]
    columns = json.loads(json.loads(view)["state"])["selectedColumns"]
    assert columns[0] == "metrics.`reward/mean`"


def test_a_kind_and_a_view_that_somebody_chose_are_kept(uri: str) -> None:
    client = MlflowClient(uri)
    chosen = {KIND: "genai_development", "mlflow.sharedViewState.ddpo": "{}"}
    client.create_experiment("ddpo", tags=chosen)
    assert chosen.items() <= client.get_experiment(opened(uri).experiment_id).tags.items()


def test_a_page_says_who_created_it_from_what_and_at_which_commit(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    monkeypatch.chdir(tree)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/ddpo", "train", "--set", "key=hunter2"])
    for words in (
        ("init", "-q"),
        ("-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "a"),
    ):
        subprocess.run(["git", *words], check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    tags = shown(uri, opened(uri)).data.tags
    assert tags["mlflow.user"] == getpass.getuser()
    assert tags["mlflow.source.name"] == "ddpo train"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.git.commit"] == head
    assert tags["mlflow.source.git.dirty"] == "false"
    # A resumed run keeps them: they are of the start that created the page.
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/ddpo", "resume"])
    assert shown(uri, opened(uri)).data.tags["mlflow.source.name"] == "ddpo train"


def test_outside_a_working_tree_a_page_has_no_commit(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "mlflow.source.git.commit" not in shown(uri, opened(uri)).data.tags


def test_the_first_chart_is_the_mean_reward(uri: str, config: RunConfig) -> None:
    _, page = trained(config, 1)
    metrics = sorted(shown(uri, page).data.metrics)
    assert metrics[:2] == ["reward/mean", "reward/std"]
    assert {"scores/failed", "scores/imputed", "scores/max"} <= set(metrics)


def test_the_description_follows_the_run(uri: str, config: RunConfig) -> None:
    _, page = trained(config, 2)
    running = note(uri, page)
    assert "**Running**: 2 of 3 epochs done" in running
    assert "ddpo resume night" in running
    assert f"(get-artifact?path=curve.png&run_uuid={page.mlflow_run_id}&epoch=1)" in running
    file = MlflowClient(uri).download_artifacts(page.mlflow_run_id, "curve.png")
    assert PIL.Image.open(file).size == (600, 300)
    first, last = (
        metric.value
        for metric in MlflowClient(uri).get_metric_history(page.mlflow_run_id, "reward/mean")
    )
    assert f"**{first:.4g}** at first (epoch 0) → **{last:.4g}** (epoch 1)" in running
    page.finish("FINISHED")
    finished = note(uri, page)
    assert "**Finished**: 2 of 3 epochs done" in finished
    assert "with `--epochs N`:\n\n```\nddpo resume night\n```" in finished


def test_a_resumed_run_writes_its_description_once_and_keeps_what_somebody_wrote(
    uri: str, config: RunConfig
) -> None:
    run, page = trained(config, 1)
    client = MlflowClient(uri)
    mine = "Mine: https://wiki/page?id=3."
    client.set_tag(page.mlflow_run_id, NOTE, f"{mine}\n\n{note(uri, page)}\n\nMine too.")
    with pytest.raises(RuntimeError), page:
        raise RuntimeError("no disk at https://me:hunter2@host/x?sig=hunter3")
    failed = note(uri, page)
    assert "**Failed**" in failed and "RuntimeError: no disk" in failed
    assert "hunter" not in failed
    as_in_a_new_process()
    again = open_page(run, "ddpo resume night")
    assert again.mlflow_run_id == page.mlflow_run_id
    text = note(uri, page)
    assert text.startswith(mine) and text.endswith("Mine too.")
    assert text.count("**Running**") == 1 and "**Failed**" not in text
    assert "RuntimeError" not in text
    again.describe()
    assert note(uri, page) == text


def test_a_stopped_run_says_so(uri: str) -> None:
    page = opened(uri)
    with pytest.raises(KeyboardInterrupt), page:
        raise KeyboardInterrupt
    assert "**Stopped**" in note(uri, page)


def test_a_note_without_room_for_the_description_is_left_alone(uri: str) -> None:
    page = opened(uri)
    MlflowClient(uri).set_tag(page.mlflow_run_id, NOTE, "x" * 7990)
    assert note(uri, opened(uri)) == "x" * 7990


def test_an_epochs_samples_are_a_dataset_and_a_table_once_it_is_committed(
    uri: str, config: RunConfig
) -> None:
    run, page = trained(config, 2)
    inputs = shown(uri, page).inputs
    digests = {entry.dataset.name: entry.dataset.digest for entry in inputs.dataset_inputs}
    assert set(digests) == {
        "prompts-prompt_list", "rollouts-epoch-00000", "rollouts-epoch-00001",
    }  # fmt: skip
    assert digests["prompts-prompt_list"] == run.pins.prompts[:36]
    assert len(set(digests.values())) == 3
    file = MlflowClient(uri).download_artifacts(page.mlflow_run_id, "samples/epoch-00001.csv")
    rows = list(csv.DictReader(Path(file).read_text().splitlines()))
    commit = EPOCH.require(run.store, Partition("night", 1))
    assert {row["sample_id"] for row in rows} == {f"night/00001/{i:06}" for i in range(8)}
    assert len(commit.rollouts) == 2
    rewards = [float(row["reward"]) for row in rows]
    assert rewards == sorted(rewards, reverse=True)
    assert {row["prompt"] for row in rows} <= {"a cat", "a dog"}


def test_an_epoch_that_mlflow_missed_is_caught_up_with_in_whole(
    uri: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run, page = trained(config, 1)
    checkpoint = EPOCH.require(run.store, Partition("night", 0)).next_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_inputs", die)
        with pytest.raises(KeyboardInterrupt):
            run_epoch(run, checkpoint, 1, page.handle)
    as_in_a_new_process()
    page = open_page(run, "ddpo resume night")
    pictures = picture_set(run, run.config.tracking.pictures)
    assert IMAGES.exists(run.store, Partition("night", 1, images_id=pictures.pictures_id))
    track_missing.fn(run.handle, page.handle, pictures, 2)
    names = [entry.dataset.name for entry in shown(uri, page).inputs.dataset_inputs]
    assert sorted(names)[1:] == ["rollouts-epoch-00000", "rollouts-epoch-00001"]
    assert "2 of 3 epochs done" in note(uri, page)
    files = MlflowClient(uri).list_artifacts(page.mlflow_run_id, "samples")
    assert [Path(file.path).name for file in files] == ["epoch-00000.csv", "epoch-00001.csv"]


@pytest.mark.parametrize("api", ["http://127.0.0.1:4999/api", None])
def test_a_page_links_to_its_flow_run_where_its_server_stays(
    uri: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch, api: str | None
) -> None:
    monkeypatch.setattr("prefect.runtime.flow_run.get_id", lambda: "1234-abcd")
    monkeypatch.setattr("prefect.runtime.flow_run.get_name", lambda: "night")
    as_in_a_new_process()
    with temporary_settings({PREFECT_API_URL: api}):
        page = open_page(start_run(config, "night"))
    tags = shown(uri, page).data.tags
    url = "http://127.0.0.1:4999/runs/flow-run/1234-abcd" if api else ""
    assert tags["prefect.flow_run_url"] == url
    assert "1234-abcd" in tags[NOTE]
    assert (f"[1234-abcd]({url})" in tags[NOTE]) is bool(api)
