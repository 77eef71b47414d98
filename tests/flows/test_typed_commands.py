"""What is typed into a command is what is used, and nothing that was typed is dropped."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from ddpo.analysis.comparison.plan import read_comparison
from ddpo.errors import ConfigError
from ddpo.runs import open_run
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.cli.common import read_parameters
from ddpo_workflow.flows.run_requests import TrainRequest

STARTER = "configs/starter.yaml"


@pytest.fixture
def ddpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setenv("DDPO_ROOT", str(tmp_path / "default"))

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), " ".join("".join(capsys.readouterr()).split())

    return run


@pytest.mark.parametrize("name", ["run #1", "2025", "[a]: it's"])
def test_the_root_is_as_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mlflow_database: Path, name: str
) -> None:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    configs = Path(__file__).parents[2] / "configs"
    for root in (name, str(tmp_path / name)):
        form = {"storage": root, "tracking": f"sqlite:///{tmp_path}/mlflow.db"}
        request = TrainRequest(
            config_file=str(configs / "starter.yaml"),
            run_id="mine",
            overrides=("storage.root=elsewhere",),
            **form,
        )
        plan = request.plan()
        assert plan.config.storage.root == root
        assert plan.store.root == f"file://{tmp_path / name}"
        comparison = read_comparison(
            configs / "starter_compare.yaml", None, (), {"storage.root": root}
        )
        assert {member.config.storage.root for member in comparison.members} == {root}
    run = plan.start()
    assert open_run(Store.open(name), "mine").config == run.config
    assert {each.name for each in tmp_path.iterdir() if each.is_dir()} == {name, "ddpo-data"}


@pytest.mark.parametrize("command", ["train", "doctor", "compare"])
def test_commands_hand_the_root_on_as_typed(
    ddpo, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    seen: list[object] = []

    def refuse(root: str | None) -> str:
        seen.append(root)
        raise ConfigError("seen")

    for module in ("ddpo.runs.start", "ddpo_workflow.flows.cli.doctor"):
        monkeypatch.setattr(f"{module}.storage_root", refuse)
    config = {"compare": "configs/starter_compare.yaml"}.get(command, STARTER)
    monkeypatch.setattr("ddpo_workflow.flows.cli.doctor._mlflow", lambda config: "")
    monkeypatch.setattr("ddpo_workflow.flows.cli.doctor._prefect", lambda config: "")
    ddpo(command, config, "--root", "/data/run #1", "--set", "storage.root=other")
    assert seen[0] == "/data/run #1"


def test_an_option_that_is_given_twice_is_refused(ddpo) -> None:
    for words, told in (
        (("sample", "mine", "--prompt", "a", "--prompt", "b", "--out", "x.png"), "--prompt"),
        (("runs", "--root", "a", "--root=b"), "--root"),
        (("resume", "mine", "--epochs", "3", "--epochs", "3"), "--epochs"),
        (("score", "colorfulness", "--run", "a", "--run", "b"), "--run"),
    ):
        status, screen = ddpo(*words)
        assert status == 2
        assert f"{told} is given 2 times, and only the last would count; give it once" in screen


def test_options_that_may_be_repeated_still_may(ddpo) -> None:
    status, screen = ddpo("train", STARTER, "--set", "epochs=0", "--set", "seed=-1")
    assert status == 2
    assert "epochs: found 0" in screen and "seed: found -1" in screen
    status, screen = ddpo("runs", "--tree", "--tree")
    assert status == 0


def test_parameters_are_as_typed() -> None:
    given = ["a=1e-3", "b=/data #1", "c=no", "d=[1, x]", "e=2025", "a=1e-4"]
    assert read_parameters(given) == {
        "a": 1e-4,
        "b": "/data #1",
        "c": "no",
        "d": [1, "x"],
        "e": 2025,
    }
    with pytest.raises(ConfigError, match=r"--param 'a={x: 1, x: 2}'.*'x' occurs twice, in line 1"):
        read_parameters(["a={x: 1, x: 2}"])


def test_metadata_of_which_a_key_stands_twice_is_refused(ddpo, tmp_path: Path) -> None:
    status, screen = ddpo(
        "score", "colorfulness", "x.png", "--metadata", '{"text": "A", "text": "B"}'
    )
    assert status == 2
    assert "'text' occurs twice" in screen


@pytest.mark.parametrize("hours", ["nan", "inf", "-inf", "1e300"])
def test_hours_are_finite(ddpo, hours: str) -> None:
    status, screen = ddpo("gc", "mine", "--older-than", hours)
    assert status == 2
    assert "Invalid value for '--older-than'" in screen
