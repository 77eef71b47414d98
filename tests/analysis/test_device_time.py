"""How long a run has had its devices: each start from its record to its end, or last commit."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddpo.analysis.page.device_time import DeviceTime, device_time
from ddpo.store import runs
from ddpo.store.objects import Store

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
TWO: Any = {"engine": {"type": "processes", "workers": 2}}
EACH_GPU: Any = {"engine": {"type": "processes", "workers": None}}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """As much of a run as is read."""
    return SimpleNamespace(store=Store.open(str(tmp_path)), run_id="night")


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def start(run: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, operation: Any) -> int:
    monkeypatch.setattr(runs, "now", lambda: at(seconds))
    return runs.append_operation(run.store, run.run_id, operation)


def end(run: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, number: int) -> None:
    monkeypatch.setattr(runs, "now", lambda: at(seconds))
    runs.record_end(run.store, run.run_id, number, "finished")


def test_starts_count_to_their_end_times_their_devices(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_time(run, []) is None
    end(run, monkeypatch, 10, start(run, monkeypatch, 0, {}))
    end(run, monkeypatch, 1005, start(run, monkeypatch, 1000, TWO))
    assert device_time(run, [at(4), at(1003)]) == DeviceTime(10 + 2 * 5, whole=True)


def test_a_killed_start_counts_to_its_last_commit(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(run, monkeypatch, 0, {})
    start(run, monkeypatch, 100, {})
    # The page is written before the start that writes it has ended.
    assert device_time(run, [at(3), at(7), at(120)]) == DeviceTime(7 + 20, whole=True)
    assert device_time(run, []) == DeviceTime(0, whole=True)


def test_an_unknown_number_of_devices_is_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    end(run, monkeypatch, 10, start(run, monkeypatch, 0, EACH_GPU))
    assert device_time(run, []) == DeviceTime(10, whole=False)
