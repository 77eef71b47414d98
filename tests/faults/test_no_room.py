"""A full disk and folders that cannot be written to: a clear error, and the run goes on after."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from ddpo.errors import ConfigError, StoreCallFailed
from ddpo.runs import start_run
from ddpo.store import backends
from tests.faults.crashes import Night
from tests.tiny import tiny_config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "way_out"),
    [(errno.ENOSPC, "Free some space there"), (errno.EROFS, "mounted read-only")],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_no_more_is_named_and_the_run_goes_on_after(
    tiny_model: Path,
    tmp_path: Path,
    mlflow_database: Path,
    number: int,
    way_out: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, night = (
        Night.plan(tiny_model, str(tmp_path / name / "store"), tmp_path / name, mlflow_database)
        for name in ("whole", "full")
    )
    whole.go()
    written = 0
    fsync = os.fsync

    def fills_up(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 100:  # within the first epoch
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(backends.os, "fsync", fills_up)
    with pytest.raises(StoreCallFailed, match=way_out) as told:
        night.go()
    assert told.value.call in ("write", "create")
    assert told.value.key in str(told.value) and str(tmp_path / "full") in str(told.value)
    assert not list((tmp_path / "full" / "store").rglob(f"{backends.TEMPORARY_PREFIX}*"))
    monkeypatch.undo()
    night.go()
    assert night.content() == whole.content()
    assert night.metrics() == whole.metrics()


def test_an_outputs_folder_that_cannot_be_written_to_is_named_at_the_start(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    outputs = str(tmp_path / "file" / "outputs")
    config = tiny_config(tiny_model, storage={"root": str(tmp_path / "store")}, outputs=outputs)
    with pytest.raises(ConfigError, match=r"output folder .*file/outputs: .*--set outputs=FOLDER"):
        start_run(config, "r")
    assert not (tmp_path / "store").exists()


def test_without_room_for_temporary_files_a_run_does_not_start(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        tiny_model, storage={"root": str(tmp_path / "store")}, outputs=str(tmp_path)
    )

    def none_is_usable() -> list[str]:
        return [str(tmp_path / "nowhere")]

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", none_is_usable)
    with pytest.raises(ConfigError, match=r"No usable temporary directory.*TMPDIR"):
        start_run(config, "r")
