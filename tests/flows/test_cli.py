"""Bad input gets one clear message with the way out, before any model is loaded, and status 2."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from ddpo_workflow.flows.cli import app as cli


@pytest.fixture
def ddpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command in this process; gives exit status and what the screen showed."""
    monkeypatch.setenv("DDPO_ROOT", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ddpo.models.pipeline_policy.PipelinePolicy._loaded", refuse)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), " ".join(capsys.readouterr().out.split())

    return run


STARTER = "configs/starter.yaml"

COMMANDS = [
    "train", "resume", "sample", "runs", "show", "watch", "diff", "evaluate", "rescore", "fork",
    "compare", "query", "export", "export-lora", "verify", "gc", "delete", "doctor", "ui",
    "report", "serve-reward", "rewards", "score", "server",
]  # fmt: skip


def test_help_lists_all_commands_from_training_to_rewards(ddpo):
    status, screen = ddpo("--help")
    assert status == 0
    listed = screen.partition("Commands")[2]
    assert re.findall(r"│ ([a-z]\S*) +[A-Z]", listed) == COMMANDS


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("sampler.stps=3", "sampler.stps: there is no such key; did you mean `steps`?"),
        ("rewards.name=x", "did you mean `reward`?"),
        ("sampler.steps=many", "sampler.steps: found 'many'; input should be a valid integer"),
        ("rollouts.shard_size=24", "does not divide samples_per_epoch 256; 4, 8, 16, 32 would"),
        ("sampler.eta=0", "every step is then deterministic"),
        ("reward.name=jpeg_compresibility", "jpeg_compressibility"),
        ("prompts.name=simple_animal", "simple_animals"),
        ("model=no/such/folder/here", "neither a folder here nor a Hub id"),
        ("model=nobody/nothing", "neither on disk nor in the Hub's cache"),
        (
            "algorithm={type: ddpo_sf, updates_per_epoch: 2}",
            "exactly one update per sampling round",
        ),
        ("tracking.uri=./mlruns", "sqlite"),
        ("epochs", "expects KEY=VALUE"),
    ],
)
def test_bad_settings_are_told_with_the_way_out(ddpo, setting: str, told: str):
    status, screen = ddpo("train", STARTER, "--set", setting)
    assert status == 2
    assert told in screen
    assert "Traceback" not in screen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(ddpo):
    status, screen = ddpo("train", STARTER, "--set", "numerics.device=cuda")
    assert status == 2
    assert "torch finds no CUDA device here" in screen


def test_a_store_that_cannot_be_written(ddpo, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("in the way")
    status, screen = ddpo("train", STARTER, "--root", str(file / "store"))
    assert status == 2
    assert "StoreNotWritable" in screen


def test_a_missing_config_names_those_that_are_there(ddpo):
    status, screen = ddpo("train", "configs/starer.yaml")
    assert status == 2
    assert "configs/starter.yaml" in screen


def test_an_unknown_run_names_the_nearest(ddpo):
    status, screen = ddpo("resume", "nothing")
    assert status == 2
    assert "no run 'nothing'" in screen


def test_a_run_id_with_another_identity_shows_the_difference(ddpo, tmp_path: Path):
    from ddpo.config.files import read_config
    from ddpo.runs import start_run

    start_run(read_config(STARTER, [f"storage.root={tmp_path / 'store'}"]), "mine")
    status, screen = ddpo(
        "train", STARTER, "--run-id", "mine", "--set", "optimizer.learning_rate=0.5",
        "--set", "numerics.micro_batch_size=8",
    )  # fmt: skip
    assert status == 2
    assert "optimizer.learning_rate: 0.002 in the store, 0.5 in the config" in screen
    assert "numerics.micro_batch_size: 64 in the store, 8 in the config" in screen


def test_the_operation_half_may_change_under_a_run_id(tmp_path: Path):
    from ddpo.config.files import read_config
    from ddpo.runs import open_run, start_run

    root = f"storage.root={tmp_path / 'store'}"
    run = start_run(read_config(STARTER, [root]), "mine")
    start_run(read_config(STARTER, [root, "epochs=99", "tracking.experiment=other"]), "mine")
    assert open_run(run.store, "mine").config.epochs == 99


def test_a_request_is_resolved_once_for_the_command_and_its_flow(
    monkeypatch: pytest.MonkeyPatch,
):
    from ddpo_workflow.flows.run_requests import TrainRequest

    resolved: list[str] = []

    def resolve(request: TrainRequest) -> str:
        resolved.append(request.run_id)
        return f"plan of {request.run_id}"

    monkeypatch.setattr(TrainRequest, "resolve", resolve)
    command = TrainRequest(config_file=STARTER, run_id="mine", overrides=("epochs=2",))
    form = {"config_file": STARTER, "run_id": "mine", "overrides": ["epochs=2"]}
    with command.resolved() as plan:
        assert TrainRequest(**form).plan() == plan == "plan of mine"
        assert resolved == ["mine"]
        # Another request is not mistaken for it, and nothing is kept for a later one.
        assert TrainRequest(config_file=STARTER, run_id="other").plan() == "plan of other"
    TrainRequest(**form).plan()
    assert resolved == ["mine", "other", "mine"]


def test_no_name_is_taken_while_mlflow_cannot_be_reached(ddpo, tmp_path: Path):
    from ddpo.errors import DdpoError
    from ddpo_workflow.flows.run_requests import TrainRequest

    form = {"tracking": "http://127.0.0.1:9", "storage": str(tmp_path / "store")}
    with pytest.raises(DdpoError, match="No MLflow server answers"):
        TrainRequest(config_file=STARTER, run_id="mine", **form).plan()
    assert not list((tmp_path / "store").rglob("run.json"))
