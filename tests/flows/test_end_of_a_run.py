"""What the end of a run says about samples without a reward, and about rewards without spread."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpo.analysis.rewards import reward_curve
from ddpo_workflow.flows.cli.running import _summarise
from tests.fold import as_in_a_new_process
from tests.recorded import record_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("on_failure", ["drop", "impute"])
def test_samples_that_failed_and_epochs_without_spread_are_said(
    tiny_model: Path,
    tmp_path: Path,
    on_failure: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    as_in_a_new_process()
    reward = {"name": "tests.recorded:first_fails", "tries": 1, "on_failure": on_failure}
    run = record_run(tiny_model, tmp_path / "store", reward=reward)
    _summarise(run)
    screen = capsys.readouterr().out
    said = {"drop": "0 imputed, 4 dropped", "impute": "4 imputed, 0 dropped"}[on_failure]
    curve = reward_curve(run)
    assert [(epoch.samples, epoch.failed, epoch.constant) for epoch in curve] == [(4, 2, True)] * 2
    assert "4 of 8 samples could not be scored" in screen
    if curve[0].imputed == 2:
        assert said in screen
    assert "2 of 2 epochs had nothing to learn from" in screen
    warnings = [text for text in caplog.messages if "nothing to learn from" in text]
    assert warnings[0].startswith("epoch 0 has nothing to learn from: its 2 scored samples all")


def test_nothing_is_said_where_nothing_is_amiss(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_in_a_new_process()
    _summarise(record_run(tiny_model, tmp_path / "store"))
    screen = capsys.readouterr().out
    assert "could not be scored" not in screen and "nothing to learn" not in screen
