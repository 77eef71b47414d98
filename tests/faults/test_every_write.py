"""A crash at any write of a run, before or after it takes effect, leaves no trace in the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.crashes import Night, Writes, watched
from tests.servers import BUCKET, ObjectStore

NightAt = Callable[..., Night]


@pytest.fixture
def night(tiny_model: Path, tmp_path: Path, mlflow_database: Path) -> NightAt:
    def at(name: str, root: str | None = None, **changes: Any) -> Night:
        folder = tmp_path / name
        place = root or str(folder / "store")
        return Night.plan(tiny_model, place, folder, mlflow_database, **changes)

    return at


def check_every_crash(night: NightAt, root: Callable[[str], str | None], every: int) -> int:
    """Crash at each `every`-th write, before and after it, and compare the resumed run.

    Args:
        night: Plans runs.
        root: Gives the root of a run's store.
        every: How many writes from one crash to the next.

    Returns:
        How many crashes there were.
    """
    whole = night("whole", root("whole"))
    with watched(Writes()) as writes:
        whole.go()
    content, metrics = whole.content(), whole.metrics()
    assert len(content) > 40 and "reward/mean" in metrics
    crashes = 0
    for at in range(1, len(writes.made) + 1):
        for moment in ("before", "after"):
            crashes += 1
            if crashes % every:
                continue
            name = f"{at}-{moment}"
            crashed = night(name, root(name))
            where = crashed.crash(at, moment)
            crashed.go()
            found = crashed.content()
            differ = sorted(key for key, data in found.items() if content.get(key) != data)
            assert not differ, f"after a crash {moment} {where}: other bytes under {differ}"
            lost = sorted(content.keys() - found.keys())
            assert not lost, f"after a crash {moment} {where}: nothing under {lost}"
            assert crashed.metrics() == metrics, f"after a crash {moment} {where}"
    return crashes // every


def on_disk(name: str) -> None:
    """Let the run's own folder hold its store."""


@pytest.fixture
def on_s3(
    seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[str], str]:
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    return lambda name: f"s3://{BUCKET}/{request.node.name}/{name}"


# An odd number of crashes from one to the next: both moments are among them.


@pytest.mark.slow
def test_a_crash_at_some_writes_changes_no_byte(night: NightAt) -> None:
    assert check_every_crash(night, on_disk, every=17) > 5


@pytest.mark.slow
def test_a_crash_at_some_writes_to_s3_changes_no_byte(
    night: NightAt, on_s3: Callable[[str], str]
) -> None:
    assert check_every_crash(night, on_s3, every=27) > 3


@pytest.mark.slow
@pytest.mark.faults
def test_a_crash_at_any_write_changes_no_byte(night: NightAt) -> None:
    print(check_every_crash(night, on_disk, every=1), "crashes")


@pytest.mark.slow
@pytest.mark.faults
def test_a_crash_at_any_write_to_s3_changes_no_byte(
    night: NightAt, on_s3: Callable[[str], str]
) -> None:
    print(check_every_crash(night, on_s3, every=1), "crashes")
