"""`ddpo doctor`: every part is looked at, and what is wrong is named with its way out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from ddpo_workflow.flows.cli import app as cli

PARTS = ("prompts", "reward", "storage", "model", "device", "memory", "MLflow", "Prefect")


def doctor(monkeypatch: pytest.MonkeyPatch, *settings: str) -> int | str | None:
    words = ["ddpo", "doctor", "configs/starter.yaml"]
    for setting in settings:
        words += ["--set", setting]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_good_set_up_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [f"storage.root={tmp_path}/store", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    assert doctor(monkeypatch, *good) in (0, None)
    screen = capsys.readouterr().out
    assert screen.splitlines()[-1] == "ready"
    assert [line.split()[1] for line in screen.splitlines() if line.startswith("ok")] == [*PARTS]
    assert "45 prompts" in screen and "creates exclusively" in screen and "GiB free" in screen
    assert "needs about 0." in screen and "update 0." in screen


def test_each_failure_is_named_and_none_hides_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    bad = [
        f"storage.root={tmp_path}/file/store",
        "tracking.uri=http://127.0.0.1:9",
        f"model.path={tmp_path}",
        "prompts.name=nothing",
    ]
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert doctor(monkeypatch, *bad) == 1
    screen = capsys.readouterr().out
    named = {line.split()[1] for line in screen.splitlines() if line.startswith("no")}
    assert named == {"prompts", "storage", "model", "MLflow", "Prefect"}
    for way_out in ("permissions", "model_index.json", "sqlite:///", "prefect server start"):
        assert way_out in screen
    assert "5 checks failed" in screen
