"""bench.floor: its batch is the library's, and its figures are what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import floor, report
from bench.report import Seconds, Spread
from tests.tiny import build_tiny_model, tiny_config


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> floor.Batch:
    folder = build_tiny_model(tmp_path_factory.mktemp("model"))
    return floor.Batch(
        tiny_config(
            folder,
            rollouts={"samples_per_epoch": 4, "shard_size": 4},
            algorithm={"updates_per_epoch": 1},
        )
    )


def forwards_of(batch: floor.Batch, *work: str) -> list[int]:
    """Return the items of each forward that some work takes."""
    seen: list[int] = []
    hook = batch.policy.network.register_forward_pre_hook(
        lambda _, given: seen.append(len(given[0]))
    )
    try:
        for name in work:
            getattr(batch, name)()
    finally:
        hook.remove()
    return seen


def test_the_bare_loop_runs_the_librarys_forwards(batch: floor.Batch) -> None:
    assert forwards_of(batch, "sample") == forwards_of(batch, "bare_forwards") == [8] * 4
    assert forwards_of(batch, "update") == forwards_of(batch, "bare_backwards") == [8] * 4


def test_the_bare_loop_reaches_every_trained_weight(batch: floor.Batch) -> None:
    parameters = batch.policy.weights.parameters()
    reached: set[str] = set()
    hooks = [
        parameter.register_hook(lambda _, name=name: reached.add(name))
        for name, parameter in parameters.items()
    ]
    batch.bare_backwards()
    for hook in hooks:
        hook.remove()
    assert reached == set(parameters)
    assert all(parameter.grad is None for parameter in parameters.values())


def test_an_update_starts_from_the_same_weights_each_time(batch: floor.Batch) -> None:
    found = []
    for _ in range(2):
        batch.update()
        found.append({name: p.clone() for name, p in batch.policy.weights.state().items()})
    for name, weights in found[0].items():
        assert torch.equal(weights, found[1][name])
    assert any(not torch.equal(found[0][n], w) for n, w in batch.state.weights.items())


def test_the_bench_prints_a_table_and_writes_what_it_measured(
    batch: floor.Batch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(floor, "read_config", lambda *_: batch.config)
    file = tmp_path / "floor.json"
    floor.main(["--rounds", "2", "--json", str(file)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["sampling", "update", "both"]
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] == 1
    assert {len(rounds) for rounds in written["seconds"].values()} == {2}


def test_rounds_alternate_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def side(name: str) -> Seconds:
        order.append(name)
        return Seconds(float(len(order)), 0.0)

    found = report.alternate({name: lambda n=name: side(n) for name in "ab"}, rounds=2)
    assert "".join(order) == "baabba"
    assert {name: [each.cpu for each in took] for name, took in found.items()} == {
        "a": [3.0, 6.0],
        "b": [4.0, 5.0],
    }


def test_a_ratio_is_taken_round_by_round() -> None:
    ours = [Seconds(cpu, 0.0) for cpu in (1.0, 4.0, 9.0)]
    bare = [Seconds(cpu, 0.0) for cpu in (1.0, 2.0, 3.0)]
    assert report.ratios(ours, bare) == Spread(2.0, 1.0, 3.0)
    assert str(Spread(2.0, 1.0, 3.0)) == "2.00 (1.00 to 3.00)"


def test_a_row_adds_up_what_an_epoch_is_made_of() -> None:
    names = {"sample": 4.0, "forwards": 3.0, "decoder": 1.0, "update": 6.0, "backwards": 5.0}
    took = {name: [Seconds(cpu, 2 * cpu)] for name, cpu in names.items()}
    assert [row[1:] for row in floor.Floor(took).rows()] == [
        ["4 s (8 s)", "4 s (8 s)", "1.00 (1.00 to 1.00)"],
        ["6 s (12 s)", "5 s (10 s)", "1.20 (1.20 to 1.20)"],
        ["10 s (20 s)", "9 s (18 s)", "1.11 (1.11 to 1.11)"],
    ]
