"""The gate of a run and its champion: by the flows, with Prefect's server and MLflow's database."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from ddpo.analysis.evaluation.champion import champion_text, gate_reason, latest_champion
from ddpo.analysis.lora_plan import plan_export
from ddpo.basics.digests import tensors_digest
from ddpo.errors import ConfigError
from ddpo.models import redraw
from ddpo.prompts import Prompt
from ddpo.runs.state import run_state
from ddpo.store.kinds import CHAMPION, CHECKPOINT
from ddpo.store.objects import Store
from ddpo.store.runs import read_starts
from ddpo.store.upkeep.retention import is_retired
from ddpo_workflow.flows.evaluate import evaluate
from ddpo_workflow.flows.train import train
from tests.night import Place
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

LIMITS_OFF: dict[str, Any] = {
    "statistics": [],
    "least_diversity": None,
    "most_kl": None,
    "most_clipped": None,
}
EVALUATION: dict[str, Any] = {"every": 2, "count": 2, "seeds": [0, 1], "kl_samples": 1}

_calls = 0
_flat_from = 0


def later_is_better(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    """Reward = number of calls so far, so that each checkpoint is better than those before it.

    Images of one call differ a little, until `_flat_from` calls.
    """
    global _calls
    _calls += 1
    flat = bool(_flat_from) and _calls >= _flat_from
    return [_calls + (0.0 if flat else 0.01 * number) for number in range(len(images))]


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    global _calls, _flat_from
    _calls = _flat_from = 0
    yield
    _calls = _flat_from = 0


def run_in(
    folder: Path, model: Path, database: Path, evaluation: dict[str, Any], **changes: Any
) -> Place:
    """Train for five epochs of four samples, or as far as the gate allows."""
    shutil.copy(database, folder / "mlflow.db")
    settings: dict[str, Any] = {
        "prompts": {"name": "prompt_list", "parameters": {"prompts": ["a cat", "a dog"]}},
        "sampler": {"steps": 2},
        "rollouts": {"samples_per_epoch": 4, "shard_size": 4},
        "optimizer": {"learning_rate": 1e-2},
        "storage": {"root": str(folder / "store")},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "outputs": str(folder / "outputs"),
        "evaluation": {**EVALUATION, **evaluation},
        "epochs": 5,
    }
    config = tiny_config(model, **{**settings, **changes})
    (folder / "config.yaml").write_text(config.model_dump_json())
    train(str(folder / "config.yaml"), run_id="r")
    return Place(Store.open(str(folder / "store")), config.tracking.uri)


def again(folder: Path, *overrides: str) -> None:
    train(str(folder / "config.yaml"), run_id="r", overrides=overrides)


def last_checkpoint(place: Place) -> int:
    return CHECKPOINT.partitions_of(place.store, "r")[-1].epoch


def adapter(folder: Path) -> str:
    (file,) = (folder / "outputs" / "r" / "lora").glob("*.safetensors")
    return tensors_digest(load_file(file))


def folder_of(uri: str) -> Path:
    return Path(urlparse(uri).path)


def adapters_by_epoch(place: Place) -> dict[str, str]:
    """Return the digest of each adapter that MLflow has, by the number of epochs trained."""
    client = MlflowClient(place.uri)
    page = place.page("r")
    found = client.search_logged_models(
        [page.info.experiment_id], filter_string=f"source_run_id = '{page.info.run_id}'"
    )
    return {
        each.params["epochs"]: tensors_digest(
            load_file(next(folder_of(each.artifact_location).rglob("*.safetensors")))
        )
        for each in found
    }


def test_a_gate_that_stops_ends_the_run_once_and_says_why(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    gate = {**LIMITS_OFF, "most_kl": 1e-12, "then": "stop"}
    place = run_in(tmp_path, tiny_model, mlflow_database, {"gate": gate})
    run = place.run("r")
    # Checkpoint 2 is evaluated while epoch 2 runs.
    assert last_checkpoint(place) == 3
    reason = gate_reason(run)
    assert reason.startswith(
        "the gate ended training at checkpoint 2: the KL divergence from the base model is "
    )
    state = run_state(run, read_starts(place.store, "r"), 3)
    assert str(state) == f"stopped at epoch 3 of 5: {reason}"
    page = place.page("r")
    assert page.data.tags["ddpo.gate"] == reason
    assert "The gate ended training" in page.data.tags["mlflow.note.content"]
    assert page.info.status == "FINISHED"
    assert latest_champion(run) is None
    assert "none" in champion_text(run)
    with pytest.raises(ConfigError, match=r"has no champion.*ddpo evaluate r"):
        plan_export(run, tmp_path / "out", champion=True)

    content = {key: place.store.read(key) for key in place.store.list() if "/starts/" not in key}
    again(tmp_path)
    assert {k: place.store.read(k) for k in place.store.list() if "/starts/" not in k} == content

    # Whoever disagrees trains on.
    again(tmp_path, "evaluation.gate.then=warn")
    assert last_checkpoint(place) == 5
    assert gate_reason(place.run("r")) == ""
    assert "ddpo.gate" not in place.page("r").data.tags
    assert run_state(place.run("r"), read_starts(place.store, "r"), 5).word == "finished"


def test_a_gate_that_rolls_back_exports_the_champion(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    global _flat_from
    # A call to try the reward; then an epoch's shard and, every second one, an evaluation.
    _flat_from = 7
    place = run_in(
        tmp_path,
        tiny_model,
        mlflow_database,
        {"gate": {**LIMITS_OFF, "then": "roll_back"}},
        reward={"name": f"{__name__}:later_is_better"},
        storage={"root": str(tmp_path / "store"), "keep_newest_checkpoints": 1},
    )
    run = place.run("r")
    assert "the share of prompts with one reward is 1" in gate_reason(run)
    champion = latest_champion(run)
    assert champion is not None
    assert champion.epoch == 2
    assert last_checkpoint(place) > 3
    assert champion.facts["largest_difference"] < 1
    # Retention has kept it, and what was handed over is it.
    assert not is_retired(place.store, "r", 2)
    assert is_retired(place.store, "r", 1)
    assert adapter(tmp_path) == adapters_by_epoch(place)["2"]
    assert plan_export(run, tmp_path / "out", champion=True).epoch == 2


def test_the_champion_has_one_version_and_one_alias_that_plain_mlflow_loads(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    place = run_in(
        tmp_path,
        tiny_model,
        mlflow_database,
        {"gate": LIMITS_OFF},
        reward={"name": f"{__name__}:later_is_better"},
    )
    again(tmp_path)
    evaluate("r", epochs="5", storage=place.store.root)  # is evaluated, and is the champion
    client = MlflowClient(place.uri)
    (version,) = client.search_model_versions("name = 'r'")
    assert client.get_registered_model("r").aliases == {"champion": version.version}
    assert version.tags["ddpo.epoch"] == "5"
    assert "Champion: checkpoint 5" in place.page("r").data.tags["mlflow.note.content"]
    assert len(CHAMPION.partitions_of(place.store, "r")) == 1
    mlflow.set_tracking_uri(place.uri)
    try:
        pipeline = mlflow.diffusers.load_model("models:/r@champion").load_pipeline()
    finally:
        mlflow.set_tracking_uri(None)
    assert pipeline.get_list_adapters()["unet"]

    # Checkpoint 3 is evaluated last, and so is the best by this reward.
    evaluate("r", storage=place.store.root)
    champion = latest_champion(place.run("r"))
    assert champion is not None
    assert champion.epoch == 3
    assert client.get_model_version_by_alias("r", "champion").tags["ddpo.epoch"] == "3"
    # The run's own page says so too, though the evaluation has a page of its own.
    page = place.page("r")
    assert page.info.status == "FINISHED"
    assert "Champion: checkpoint 3" in page.data.tags["mlflow.note.content"]


def test_weights_that_draw_something_else_are_no_champion(
    tiny_model: Path,
    mlflow_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = tmp_path / "black.py"
    program.write_text(
        "import json, sys\nfrom pathlib import Path\nfrom PIL import Image\n"
        "file = Path(sys.argv[1])\njob = json.loads(file.read_text())\n"
        "for n in range(len(job['prompts'])):\n"
        "    Image.new('RGB', (16, 16)).save(file.with_name(f'{n}.png'))\n"
    )
    monkeypatch.setattr(redraw, "__file__", str(program))
    place = run_in(
        tmp_path,
        tiny_model,
        mlflow_database,
        {"gate": LIMITS_OFF},
        reward={"name": f"{__name__}:later_is_better"},
    )
    assert "draws other images with them: they differ by" in caplog.text
    assert latest_champion(place.run("r")) is None
    assert not MlflowClient(place.uri).search_registered_models()
    assert place.page("r").info.status == "FINISHED"

    program.write_text("raise SystemExit('no such device')")
    again(tmp_path)
    assert "cannot draw with them: no such device" in caplog.text

    monkeypatch.undo()
    again(tmp_path)
    assert latest_champion(place.run("r")) is not None


def test_a_fully_trained_champion_is_registered_as_its_pipeline(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    place = run_in(
        tmp_path,
        tiny_model,
        mlflow_database,
        {"gate": LIMITS_OFF, "kl_samples": 0},
        reward={"name": f"{__name__}:later_is_better"},
        trainable={"type": "full"},
        optimizer={"learning_rate": 1e-4},
        epochs=1,
    )
    version = MlflowClient(place.uri).get_model_version_by_alias("r", "champion")
    assert (folder_of(version.source) / "model_index.json").is_file()
    weights = folder_of(version.source) / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()

    # A later champion leaves the files of this version alone.
    again(tmp_path, "epochs=2")
    later = MlflowClient(place.uri).get_model_version_by_alias("r", "champion")
    assert (version.tags["ddpo.epoch"], later.tags["ddpo.epoch"]) == ("1", "2")
    assert weights.read_bytes() == before
    assert (folder_of(later.source) / weights.relative_to(folder_of(version.source))).is_file()


def test_a_second_run_of_the_name_gets_a_registered_model_of_its_own(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "reward": {"name": f"{__name__}:later_is_better"},
        "epochs": 1,
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run_in(tmp_path / name, tiny_model, mlflow_database, {"gate": LIMITS_OFF}, **changes)
    client = MlflowClient(changes["tracking"]["uri"])
    names = [each.name for each in client.search_registered_models()]
    assert sorted(len(name) for name in names) == [1, 10]
    assert all(client.get_model_version_by_alias(name, "champion") for name in names)
