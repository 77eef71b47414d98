"""A first start that is stopped between its two records, or meets a store that is away."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fsspec.exceptions import FSTimeoutError

from ddpo.basics import outages
from ddpo.config import RunConfig
from ddpo.runs import check_run, open_run
from ddpo.store import runs
from ddpo.store.backends import LocalBackend
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.run_requests import ResumeRequest, TrainRequest
from tests.faults.crashes import Crash
from tests.tiny import tiny_config


@pytest.fixture
def small(tiny_model: Path, mlflow_database: Path, tmp_path: Path) -> RunConfig:
    """A run of two epochs; the default is another number."""
    return tiny_config(
        tiny_model,
        epochs=2,
        storage={"root": str(tmp_path / "store")},
        tracking={"uri": f"sqlite:///{mlflow_database}"},
        outputs=str(tmp_path / "outputs"),
    )


def test_a_run_without_a_start_is_not_resumed_but_started_by_the_same_command(
    small: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def die(*words: object) -> int:
        raise Crash

    plan = check_run(small, "halved")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(runs, "append_operation", die)
        plan.start()
    assert not plan.begun.is_set() and not check_run(small, "halved").begun.is_set()

    root = str(tmp_path / "store")
    monkeypatch.setattr("sys.argv", ["ddpo", "resume", "halved", "--root", root])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    screen = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 2
    assert re.search(r"`\S*ddpo train CONFIG --run-id halved`", screen)

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(small.whole()))
    run = TrainRequest(config_file=str(file), run_id="halved").plan().start()
    assert (run.start, run.config.epochs) == (1, 2)
    resumed = ResumeRequest(run_id="halved", storage=root).plan().start()
    assert (resumed.start, resumed.config) == (2, run.config)


def test_a_start_waits_for_the_store_at_each_of_its_records(
    small: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "_FIRST_WAITS_S", (0.0,) * 5)
    create: Callable[..., Any] = LocalBackend.create
    tried: list[str] = []

    def away_at_first(self: LocalBackend, path: str, data: bytes) -> bool:
        tried.append(Path(path).name)
        if tried.count(tried[-1]) < 3:
            raise FSTimeoutError
        return create(self, path, data)

    plan = check_run(small, "waiting")
    monkeypatch.setattr(LocalBackend, "create", away_at_first)
    run = plan.start()
    assert tried == ["run.json"] * 3 + ["00001.json"] * 3
    assert open_run(run.store, "waiting").config == run.config
