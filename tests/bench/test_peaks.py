"""bench.peaks: what is measured is the work's own memory, and each side does the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import peaks
from bench.floor import Batch
from tests.tiny import build_tiny_model, tiny_config


def test_the_peak_is_of_the_work_alone() -> None:
    large = torch.ones(50_000_000)  # 200 MB that lived before
    del large

    def work() -> None:
        torch.ones(25_000_000)

    found = peaks.measured(work, "cpu")
    assert 90 < found["peak"] - found["before"] < 150


def test_an_epoch_of_several_batches_runs_the_same_forwards_on_both_sides(tmp_path: Path) -> None:
    rollouts = {"samples_per_epoch": 8, "shard_size": 4}
    config = tiny_config(build_tiny_model(tmp_path / "model"), rollouts=rollouts)
    drawn = Batch(peaks._of_part(config, "sampling")).sample()
    batch = Batch(config, drawn)
    assert torch.equal(batch.rollouts.latents[4:], drawn.latents)
    seen: list[tuple[int, bool]] = []
    batch.policy.network.register_forward_pre_hook(
        lambda _, given: seen.append((len(given[0]), torch.is_grad_enabled()))
    )
    for side in peaks.SIDES:
        peaks.work_of(batch, "epoch", side)()
        assert seen == [(8, False)] * 8 + [(8, True)] * 8  # with guidance: two batches, four steps
        seen.clear()


@pytest.mark.slow
def test_each_side_is_measured_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peaks, "PARTS", ("epoch",))  # each process imports for seconds
    file, changes = tmp_path / "peaks.json", []
    for setting in (
        f"model.path={build_tiny_model(tmp_path / 'model')}",
        "rollouts={samples_per_epoch: 4, shard_size: 2}",
        "numerics={device: cpu, sample_batch_size: 2, micro_batch_size: 2, threads: 1}",
        "algorithm.updates_per_epoch=2",
    ):
        changes += ["--set", setting]
    peaks.main([*changes, "--json", str(file)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["epoch"]
    written = json.loads(file.read_text())
    assert len(written["megabytes"]) == 2 and written["machine"]["torch"]
    assert all(each["peak"] >= each["before"] > 50 for each in written["megabytes"].values())
