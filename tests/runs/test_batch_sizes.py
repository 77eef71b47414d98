"""Batch sizes that are `auto`: what is taken, that a run keeps it, and what it costs nobody."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.errors import ConfigError, RunIdentityMismatch
from ddpo.models import Policy
from ddpo.models.numerics import resolve_numerics
from ddpo.runs import Run, batch_search, check_run, open_run, start_run
from ddpo.runs.batch_choice import TOLERANCE, candidates, choose, no_longer_gains
from ddpo.runs.batch_search import BatchSearch, BatchSizes
from ddpo.runs.forks.plan import fork_config
from ddpo.store.objects import Store
from ddpo.training import loop as training
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.run_requests import ResumeRequest, TrainRequest
from ddpo_workflow.tasks import worker
from tests.fold import as_in_a_new_process, run_epochs
from tests.tiny import load_policy, tiny_config

AUTO = {"sample_batch_size": "auto", "micro_batch_size": "auto"}


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[BatchSizes]:
    """What every search of this process finds, in order."""
    found: list[BatchSizes] = []
    search = BatchSearch._search

    def recorded(self: BatchSearch, config: RunConfig) -> BatchSizes:
        found.append(search(self, config))
        return found[-1]

    monkeypatch.setattr(BatchSearch, "_search", recorded)
    return found


def auto_config(model: Path, folder: Path, **changes: Any) -> RunConfig:
    places = {"storage": {"root": f"{folder}/store"}, "outputs": f"{folder}/outputs"}
    return tiny_config(model, **{"numerics": AUTO, **places, **changes})


def sizes(run: Run) -> tuple[int, int]:
    return run.numerics.sample_batch_size, run.numerics.micro_batch_size


@pytest.mark.parametrize(
    ("shard", "most", "together", "expected"),
    [
        (64, 64, 1, [1, 2, 4, 8, 16, 32, 64]),
        (64, 384, 1, [1, 2, 4, 8, 16, 32, 64, 128, 256]),  # an update may have more than a shard
        (8, 3, 1, [1, 2]),
        (8, 32, 2, [2, 4, 8, 16, 32]),
        (12, 12, 1, [1, 2, 4, 6, 12]),  # a batch divides its shard
        (50, 50, 1, [1, 2, 5, 10, 25, 50]),
        (5, 8, 2, [2]),
        (5, 10, 2, [2, 10]),
        (7, 1, 2, [2]),  # what a loss compares stays together
    ],
)
def test_sizes_are_powers_of_two_or_the_divisors_nearest(
    shard: int, most: int, together: int, expected: Sequence[int]
) -> None:
    assert candidates(shard, most, together) == expected


def test_a_given_size_is_tried_if_the_other_batch_can_have_it() -> None:
    assert candidates(60, 384, given=20) == [1, 2, 4, 6, 15, 20, 30, 60, 120, 240]
    assert candidates(64, 64, given=128) == candidates(64, 64)
    assert candidates(60, 60, given=7) == candidates(60, 60, given="auto")


@pytest.mark.parametrize(
    ("sampling", "update", "apart", "expected"),
    [
        # Each the smallest within the tolerance of its own best.
        ({1: 4.0, 2: 2.08, 4: 2.0}, {1: 5.0, 2: 4.0, 4: 3.0}, None, (2, 4)),
        ({1: 4.0, 2: 2.12, 4: 2.0}, {1: 5.0, 2: 3.1, 4: 3.0}, None, (4, 2)),
        # Equal ones where that costs little ...
        ({1: 1.0, 8: 0.9}, {1: 9.0, 8: 8.0}, 0.0, (8, 8)),
        ({1: 4.0, 2: 2.0, 4: 1.0}, {1: 5.0, 2: 4.9, 4: 5.1}, 0.0, (4, 4)),
        # ... and different ones where equal ones would cost much ...
        ({1: 4.0, 2: 2.0, 4: 1.0}, {1: 2.0, 2: 2.0, 4: 5.0}, 0.0, (4, 1)),
        # ... unless the log-probs that are then computed again cost more.
        ({1: 4.0, 2: 2.0, 4: 1.0}, {1: 2.0, 2: 2.0, 4: 5.0}, 2.0, (2, 2)),
        # One is given.
        ({3: 0.0}, {1: 5.0, 2: 4.0, 4: 3.9}, 0.0, (3, 2)),
        ({3: 0.0}, {1: 5.0, 2: 4.0, 3: 4.05, 4: 3.9}, 0.0, (3, 3)),
        ({1: 5.0, 2: 4.0, 4: 3.9}, {8: 0.0}, None, (2, 8)),
        # Smaller is faster: batches lose.
        ({1: 1.0, 2: 1.1, 4: 1.3}, {1: 1.0, 2: 1.2}, 0.0, (1, 1)),
    ],
)
def test_the_smallest_sizes_that_are_about_the_fastest_are_taken(
    sampling: Mapping[int, float],
    update: Mapping[int, float],
    apart: float | None,
    expected: tuple[int, int],
) -> None:
    assert choose(sampling, update, apart) == expected


def test_a_choice_costs_no_more_than_it_says() -> None:
    """Over many measurements: within the tolerance, and no smaller pair of its kind would do."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(200):
        times = (torch.rand(2, 5, generator=draws) + 0.5).tolist()
        sampling, update = ({2**i: each for i, each in enumerate(row)} for row in times)
        sample, micro = choose(sampling, update, 0.0)
        best = min(sampling.values()) + min(update.values())
        assert sampling[sample] + update[micro] <= best * (1 + TOLERANCE)
        equal = [n for n in sampling if sampling[n] + update[n] <= best * (1 + TOLERANCE)]
        assert (sample, micro) == (min(equal), min(equal)) if equal else sample != micro


def test_a_search_ends_once_two_sizes_have_gained_nothing() -> None:
    assert not no_longer_gains([3.0])
    assert not no_longer_gains([3.0, 4.0])
    assert not no_longer_gains([3.0, 4.0, 2.0])
    assert not no_longer_gains([3.0, 2.99, 2.5])
    assert no_longer_gains([3.0, 2.99, 2.98])
    assert no_longer_gains([4.0, 3.0, 5.0, 6.0])


def test_a_run_keeps_what_its_first_start_found(
    tiny_model: Path, tmp_path: Path, searches: list[BatchSizes]
) -> None:
    config = auto_config(tiny_model, tmp_path)
    first = start_run(config, "r")
    (found,) = searches
    assert sizes(first) == (found.sample, found.micro)
    assert first.config.numerics.sample_batch_size == found.sample  # in place of `auto`
    record = json.loads((tmp_path / "store/runs/r/run.json").read_text())
    assert record["numerics"]["sample_batch_size"] == found.sample
    last = run_epochs(first, 1)

    as_in_a_new_process()
    again = start_run(config, "r")
    resumed = ResumeRequest(run_id="r", storage=f"{tmp_path}/store", epochs=2).resolve().start()
    assert sizes(again) == sizes(resumed) == sizes(first) and len(searches) == 1
    assert run_epochs(resumed, 1) == last

    assert fork_config(resumed, 1).numerics == first.config.numerics
    other = {**AUTO, "micro_batch_size": found.micro * 2}  # a number has to be the same
    with pytest.raises(RunIdentityMismatch, match="micro_batch_size"):
        start_run(config.changed(numerics=config.numerics.changed(**other)), "r")


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_bytes_of_one_that_was_given_the_same_sizes(
    tiny_model: Path, tmp_path: Path, searches: list[BatchSizes]
) -> None:
    as_in_a_new_process()
    run_epochs(start_run(auto_config(tiny_model, tmp_path / "auto"), "r"), 1)
    as_in_a_new_process()
    resumed = run_epochs(start_run(auto_config(tiny_model, tmp_path / "auto"), "r"), 2)
    (found,) = searches
    given = {"sample_batch_size": found.sample, "micro_batch_size": found.micro}
    as_in_a_new_process()
    straight = start_run(auto_config(tiny_model, tmp_path / "given", numerics=given), "r")
    assert run_epochs(straight, 2) == resumed


def test_what_measuring_changed_is_not_trained_on(
    tiny_model: Path, tmp_path: Path, searches: list[BatchSizes]
) -> None:
    """The model that was measured has taken optimizer steps; the run gets a fresh one."""
    as_in_a_new_process()
    file = tmp_path / "config.yaml"
    config = auto_config(tiny_model, tmp_path, tracking={"uri": f"sqlite:///{tmp_path}/m.db"})
    file.write_text(json.dumps(config.whole()))
    plan = TrainRequest(config_file=str(file), run_id="r").resolve()
    (found,) = searches
    assert not plan.awaits_sizes and plan.batch_sizes == found
    assert plan.numerics.sample_batch_size == found.sample
    run = plan.start()
    with worker.fresh_policy(run) as policy:
        assert policy.digest == load_policy(run.config).digest
        assert policy.numerics == run.numerics


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"type": "dpo"}, "rollouts": {"samples_per_prompt": 2}},
        {"algorithm": {"type": "nft"}, "rollouts": {"samples_per_prompt": 4}},
        {"algorithm": {"type": "rwr", "updates_per_epoch": 10, "inner_epochs": 5}},
        {"algorithm": {"type": "ddpo_sf", "updates_per_epoch": 1}, "trainable": {"type": "full"}},
        {"algorithm": {"kl_weight": 0.1}, "sampler": {"window": {"steps": 2}}},
        {"numerics": {**AUTO, "compile": True}},
        {"numerics": {**AUTO, "gradient_checkpointing": True, "dtype": "bfloat16"}},
        {"optimizer": {"ema_decay": 0.9}, "rollouts": {"samples_per_epoch": 12, "shard_size": 6}},
    ],
    ids=["dpo", "nft", "rwr", "full", "kl", "compile", "bfloat16", "ema"],
)
def test_any_run_finds_sizes_that_its_config_allows(
    changes: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    config = auto_config(tiny_model, tmp_path, **changes)
    run = start_run(config, "r")
    sample, micro = sizes(run)
    assert config.rollouts.shard_size % sample == 0
    assert micro % config.algorithm.needs.samples_per_loss == 0
    assert run.numerics.compile == config.numerics.compile


def test_one_size_alone_can_be_found(
    tiny_model: Path, tmp_path: Path, searches: list[BatchSizes]
) -> None:
    numerics = {"sample_batch_size": 2, "micro_batch_size": "auto"}
    run = start_run(auto_config(tiny_model, tmp_path, numerics=numerics), "r")
    (found,) = searches
    assert run.numerics.sample_batch_size == 2 and run.numerics.micro_batch_size == found.micro
    assert "ms per item" in found.message and "ms per image" not in found.message


def test_runs_that_are_measured_alike_are_measured_once(
    policy: Policy, config: RunConfig, searches: list[BatchSizes]
) -> None:
    search = BatchSearch(policy)
    auto = config.changed(numerics=config.numerics.changed(**AUTO))
    assert search.sizes(auto) is search.sizes(auto.changed(seed=5))
    assert len(searches) == 1
    search.sizes(auto.changed(algorithm={"type": "ddpo_sf", "updates_per_epoch": 1}))
    assert len(searches) == 2


def test_runs_that_start_together_are_measured_by_one_model(
    tiny_model: Path, tmp_path: Path, searches: list[BatchSizes]
) -> None:
    """As those of a comparison."""
    as_in_a_new_process()
    config = auto_config(tiny_model, tmp_path)
    given = {"sample_batch_size": 2, "micro_batch_size": 2}
    configs = {
        "numbers": config.changed(numerics=config.numerics.changed(**given)),
        "first": config,
        "second": config.changed(seed=1),
    }
    plans = worker.check_model([check_run(each, name) for name, each in configs.items()])
    (found,) = searches
    runs = {plan.run_id: plan.start() for plan in plans}
    assert [*runs] == [*configs] and sizes(runs["numbers"]) == (2, 2)
    assert sizes(runs["first"]) == sizes(runs["second"]) == (found.sample, found.micro)
    for run in runs.values():
        with worker.fresh_policy(run) as policy:
            assert policy.digest == load_policy(run.config).digest


def test_no_batch_is_tried_that_memory_has_no_room_for(
    policy: Policy, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = psutil.virtual_memory()._replace(available=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
    auto = config.changed(numerics=config.numerics.changed(**AUTO))
    found = BatchSearch(policy).sizes(auto)
    assert (found.sample, found.micro) == (1, 1)  # the smallest is all that is left
    assert "by size: 1:" in found.message and "2:" not in found.message


def test_a_batch_that_runs_out_of_memory_is_dropped_and_no_larger_one_tried(
    policy: Policy, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    updated: list[int] = []

    def update(policy: Policy, *given: Any, **named: Any) -> Any:
        updated.append(policy.numerics.micro_batch_size)
        if updated[-1] == 4:
            raise torch.OutOfMemoryError("planted")
        return training.update(policy, *given, **named)

    monkeypatch.setattr(batch_search, "update", update)
    monkeypatch.setattr(batch_search, "no_longer_gains", lambda seconds: False)
    auto = config.changed(numerics=config.numerics.changed(**AUTO))
    found = BatchSearch(policy).sizes(auto)
    assert updated == sorted(updated) and updated[-1] == 4 and updated.count(4) == 1
    assert found.micro in (1, 2)


def test_batches_of_evaluations_have_to_fit_too(
    policy: Policy, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int, float]] = []
    predict = type(policy).predict

    def seen(self: Policy, latents: torch.Tensor, times: Any, given: Any, scale: float) -> Any:
        shown.append((len(latents), latents.shape[-1], scale))
        if scale == 7.0 and len(latents) > 2:
            raise torch.OutOfMemoryError("planted")
        return predict(self, latents, times, given, scale)

    monkeypatch.setattr(type(policy), "predict", seen)
    monkeypatch.setattr(batch_search, "no_longer_gains", lambda seconds: False)
    auto = config.changed(
        numerics=config.numerics.changed(sample_batch_size="auto"),
        evaluation={"every": 1, "guidance_scale": 7.0, "resolution": 32},
    )
    assert BatchSearch(policy).sizes(auto).sample <= 2
    assert (2, 16, 7.0) in shown and (4, 16, 7.0) in shown  # of 32 pixels
    assert not [size for size, _, scale in shown if scale != 7.0 and size > 2]


def test_a_model_that_a_failed_search_has_changed_is_not_trained_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_in_a_new_process()

    def fail(self: BatchSearch, config: RunConfig) -> BatchSizes:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(BatchSearch, "_search", fail)
    config = auto_config(tiny_model, tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        worker.check_model([check_run(config, "r")])
    assert worker._loaded is None


def test_ray_has_to_be_given_a_number_of_workers(policy: Policy, config: RunConfig) -> None:
    auto = config.changed(numerics=config.numerics.changed(**AUTO), engine={"type": "ray"})
    with pytest.raises(ConfigError, match=r"set engine\.workers"):
        BatchSearch(policy).sizes(auto)


def test_configs_without_auto_are_the_same_as_before() -> None:
    """The digest is of run.json as it was before batch sizes could be `auto`."""
    config = read_config("configs/starter.yaml")
    assert config.whole()["numerics"] == {
        "device": "cpu",
        "dtype": "auto",
        "sample_batch_size": 64,
        "micro_batch_size": 64,
        "threads": "auto",
        "tf32": True,
        "gradient_checkpointing": False,
    }
    assert resolve_numerics(config.numerics) == resolve_numerics(config.smallest_batches)


def test_outside_of_a_run_a_number_is_asked_for(config: RunConfig) -> None:
    auto = config.numerics.changed(sample_batch_size="auto")
    with pytest.raises(ConfigError, match="set a number"):
        resolve_numerics(auto)


@pytest.mark.parametrize("bad", [0, -1, "most", 1.5])
def test_nothing_else_is_a_size(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"numerics\.micro_batch_size"):
        read_config("configs/starter.yaml", [f"numerics.micro_batch_size={bad}"])


def test_doctor_measures_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    searches: list[BatchSizes],
) -> None:
    words = [f"storage.root={tmp_path}/store", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    words += [f"numerics.{name}=auto" for name in AUTO]
    argv = ["ddpo", "doctor", "configs/starter.yaml"]
    monkeypatch.setattr(sys, "argv", [*argv, *(w for s in words for w in ("--set", s))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    screen = capsys.readouterr().out
    assert ended.value.code in (0, None), screen
    assert "with the smallest batches: the first start measures" in screen and not searches


@pytest.mark.slow
def test_a_run_by_the_command_says_what_it_chose(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    searches: list[BatchSizes],
) -> None:
    as_in_a_new_process()
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "system_metrics": False}
    config = auto_config(tiny_model, tmp_path, tracking=tracking, epochs=1)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.whole()))
    monkeypatch.setattr(sys, "argv", ["ddpo", "train", str(file), "--run-id", "mine"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    screen = capsys.readouterr()
    assert ended.value.code in (0, None), screen.err
    (found,) = searches
    assert found.message in screen.out.replace("\n", " ")
    run = open_run(Store.open(f"{tmp_path}/store"), "mine")
    assert sizes(run) == (found.sample, found.micro)
    assert not check_run(config, "mine").awaits_sizes
