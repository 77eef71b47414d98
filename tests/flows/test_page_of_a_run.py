"""The page that a run leaves: beside its picture, in MLflow, and by `ddpo report`."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.train import resume
from tests.night import EPOCHS, NIGHT, Place, typed

pytestmark = pytest.mark.slow


def test_a_run_leaves_its_page_and_the_command_writes_it_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = Path(place.run(NIGHT).config.outputs) / NIGHT
    page = (outputs / "report.html").read_text()
    assert f"in epoch {EPOCHS - 1}" in page and f"resume {NIGHT} --root" in page
    assert f'max="{EPOCHS}"' in page  # a step of the slider for every checkpoint

    logged = MlflowClient(place.uri).list_artifacts(place.page(NIGHT).info.run_id)
    assert {"report.png", "report.html"} <= {file.path for file in logged}

    monkeypatch.chdir(tmp_path)
    root = place.store.root.removeprefix("file://")
    typed(monkeypatch, "report", NIGHT, "--root", root)
    again = (tmp_path / f"{NIGHT}.html").read_text()
    assert again.count("<img") == page.count("<img") and len(again) > len(page) / 2


def test_a_file_that_cannot_be_written_is_one_message(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    root = place.store.root.removeprefix("file://")
    words = ["report", NIGHT, "--root", root, "--out", str(tmp_path / "file" / "a.html")]
    monkeypatch.setattr("sys.argv", ["ddpo", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "cannot be written" in " ".join(capsys.readouterr().out.split())


def test_an_old_epoch_that_is_damaged_does_not_fail_a_trained_run(place: Place) -> None:
    shard = ROLLOUTS.require(place.store, Partition(NIGHT, 0, 0))
    samples = shard.objects["samples"]
    data = place.store.read(samples.key)
    page = Path(place.run(NIGHT).config.outputs) / NIGHT / "report.html"
    page.unlink()
    place.store.delete(samples.key)
    try:
        resume(NIGHT, storage=place.store.root)
        assert not page.exists()
    finally:
        place.store.put_if_absent(samples.key, data)
    resume(NIGHT, storage=place.store.root)
    assert page.exists()
