"""A name is taken only by what can be read again; what cannot is listed with its reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ddpo.errors import ConfigError
from ddpo.runs import check_run, open_run, start_run
from ddpo.runs.forks.plan import fork_config
from ddpo.store import keys
from ddpo.store.objects import Store
from ddpo.store.runs import RunRecord, StartRecord, list_operations, load_run
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.run_requests import ResumeRequest, TrainRequest
from tests.recorded import record_run
from tests.tiny import tiny_config

STARTER = "configs/starter.yaml"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def ddpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: Store):
    monkeypatch.setenv("DDPO_ROOT", store.root)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    return run


def test_a_setting_that_cannot_be_stored_takes_no_name(ddpo, store: Store) -> None:
    bad = ("--set", "optimizer.max_grad_norm=.inf")
    status, screen = ddpo("train", STARTER, "--run-id", "mine", *bad)
    assert status == 2
    assert "optimizer.max_grad_norm: found inf; input should be a finite number" in screen
    assert store.list("runs") == []
    assert ddpo("runs")[0] == 0


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_form_with_a_number_that_is_not_finite_is_refused(store: Store, number: float) -> None:
    request = TrainRequest(
        config_file=STARTER, run_id="mine", learning_rate=number, storage=store.root
    )
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: found (inf|nan)"):
        request.plan()


def test_what_would_be_read_otherwise_is_never_written(tiny_model: Path, store: Store) -> None:
    plan = check_run(tiny_config(tiny_model, storage={"root": store.root}), "mine")
    for identity, told in (
        ({**plan.identity, "seed": -1}, "seed: found -1"),
        ({**plan.identity, "seed": 7}, "seed: 7 in the store, 0 in the config"),
        ({**plan.identity, "digests": {}}, "reward_id: Field required"),
        ({**plan.identity, "seed": float("inf")}, "not JSON compliant"),
    ):
        with pytest.raises(ConfigError, match=told):
            replace(plan, identity=identity)
    assert store.list("runs") == []


def test_an_unreadable_run_is_listed_with_its_reason(ddpo, store: Store, tiny_model: Path) -> None:
    start_run(tiny_config(tiny_model, storage={"root": store.root}), "good")
    record = load_run(store, "good")
    optimizer = {**record.identity["optimizer"], "learning_rate": None}
    records = {
        "no-rate": record.identity | {"optimizer": optimizer},
        "no-digests": record.identity | {"digests": None},
    }
    for run_id, identity in records.items():
        broken = RunRecord.model_validate({**dict(record), "run_id": run_id, "identity": identity})
        store.put_if_absent(keys.run_key(run_id), broken.to_bytes())
    store.put_if_absent(keys.run_key("no-json"), b"{")
    store.put_if_absent(keys.run_key("bad-start"), record.to_bytes())
    bad = StartRecord(uid="", operation={"epochs": None})
    store.put_if_absent(keys.start_key("bad-start", 1), bad.to_bytes())
    for words in (("runs",), ("runs", "--tree")):
        status, screen = ddpo(*words)
        assert status == 0
        rows = {run_id: row for row in screen.splitlines() for run_id in row.split()[1:2]}
        assert "jpeg_compressibility" in rows["good"]
        assert "optimizer.learning_rate" in rows["no-rate"]
        assert "digests" in rows["no-digests"] or "valid dictionary" in rows["no-digests"]
        assert "cannot read" in rows["no-json"]
        assert "epochs" in rows["bad-start"]


@pytest.mark.slow
def test_a_fork_is_not_resumed_to_its_first_epoch(tiny_model: Path, store: Store) -> None:
    parent = record_run(tiny_model, store.root)
    run = start_run(fork_config(parent, 1, epochs=4), "fork")
    with pytest.raises(ConfigError, match="epochs 1: the fork's first epoch is 1"):
        ResumeRequest(run_id="fork", storage=store.root, epochs=1).plan()
    assert len(list_operations(store, "fork")) == 1
    assert open_run(store, "fork").config == run.config
    for epochs in (0, -1):
        with pytest.raises(ConfigError, match=f"epochs: found {epochs}; input should be greater"):
            ResumeRequest(run_id="mine", storage=store.root, epochs=epochs).plan()
