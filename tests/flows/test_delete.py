"""`ddpo delete`: a run is gone from the store, and its name is free for another one."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from ddpo.config import ForkConfig
from ddpo.errors import DdpoError, MissingObject, RunBeingDeleted, RunHasForks
from ddpo.runs import check_run, open_run, start_run
from ddpo.runs.forks.records import record_fork
from ddpo.runs.lease import held_lease
from ddpo.store import keys, runs
from ddpo.store.objects import Store
from ddpo.store.upkeep.delete import begin_deletion, finish_deletion, plan_deletion
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.run_requests import new_run_id
from tests.faults.crashes import RUN, Crash, Night, Writes, watched


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a store of one finished run, and its database."""
    folder = tmp_path_factory.mktemp("finished") / "night"
    Night.plan(tiny_model, str(folder / "store"), folder, mlflow_database).go()
    return folder


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    """A copy of that store."""
    shutil.copytree(finished / "store", tmp_path / "store")
    return Store.open(str(tmp_path / "store"))


def ddpo(monkeypatch: pytest.MonkeyPatch, *words: str, answer: str = "") -> int:
    monkeypatch.setattr("sys.argv", ["ddpo", *words])
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def pages(uri: str, view: int = ViewType.ACTIVE_ONLY) -> list[str]:
    """Return the names of the pages, the newest first."""
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return [run.info.run_name for run in client.search_runs(experiments, run_view_type=view)]


def fork_of(store: Store, fork: str) -> None:
    """Start a fork of the run, as `ddpo fork` does."""
    parent = runs.load_run(store, RUN)
    identity = {**parent.identity, "fork": ForkConfig(run_id=RUN, epoch=1).model_dump(mode="json")}
    runs.create_or_check_run(store, fork, identity=identity, numerics=parent.numerics, code={})
    runs.record_fork(store, RUN, fork, 1)


@pytest.mark.slow
def test_a_deleted_run_leaves_nothing_and_its_name_to_another_run(
    tiny_model: Path,
    mlflow_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "night"
    night = Night.plan(tiny_model, str(folder / "store"), folder, mlflow_database)
    night.go()
    before, uri = night.metrics(), night.config.tracking.uri
    start_run(night.config, "other")
    others = {key: night.store.read(key) for key in night.store.list() if "other" in key}
    assert ddpo(monkeypatch, "delete", RUN, "--yes", "--root", night.store.root) == 0
    assert RUN in capsys.readouterr().out
    assert {key: night.store.read(key) for key in night.store.list()} == others
    assert pages(uri) == [] and pages(uri, ViewType.DELETED_ONLY) == [RUN]
    night.go()
    assert night.metrics() == before and pages(uri) == [RUN]


@pytest.mark.slow
def test_runs_of_one_name_in_two_stores_have_a_page_each(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    nights = [
        Night.plan(tiny_model, str(tmp_path / name / "store"), tmp_path / name, mlflow_database)
        for name in ("one", "two")
    ]
    uri = nights[0].config.tracking.uri
    for seed, night in enumerate(nights):
        tracking = night.config.tracking.model_copy(update={"uri": uri})
        Night(
            night.config.model_copy(update={"seed": seed, "tracking": tracking}), night.store
        ).go()
    client = MlflowClient(uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    curves = [
        [m.value for m in client.get_metric_history(run.info.run_id, "reward/mean")]
        for run in found
    ]
    assert [run.info.run_name for run in found] == [RUN, RUN]
    assert curves[0] != curves[1] and [len(curve) for curve in curves] == [2, 2]


def test_a_run_in_training_is_refused_by_name(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with held_lease(store, RUN):
        before = store.list()
        assert ddpo(monkeypatch, "delete", RUN, "--yes", "--root", store.root) == 2
        screen = " ".join(capsys.readouterr().out.split())
        assert f"run '{RUN}' is being trained by process {os.getpid()}" in screen
        assert store.list() == before
    assert ddpo(monkeypatch, "delete", RUN, "--yes", "--root", store.root) == 0


def test_a_run_with_forks_is_refused_by_name_with_the_way_out(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fork_of(store, "brighter")
    before = store.list()
    assert ddpo(monkeypatch, "delete", RUN, "--yes", "--root", store.root) == 2
    screen = " ".join(capsys.readouterr().out.split())
    assert "brighter" in screen and "ddpo delete brighter" in screen
    assert store.list() == before
    assert ddpo(monkeypatch, "delete", "brighter", "--yes", "--root", store.root) == 0
    assert not store.exists(keys.fork_key(RUN, "brighter"))
    assert ddpo(monkeypatch, "delete", RUN, "--yes", "--root", store.root) == 0
    assert store.list() == []


def test_a_fork_that_was_not_recorded_beside_its_parent_counts_too(store: Store) -> None:
    fork_of(store, "brighter")
    store.delete(keys.fork_key(RUN, "brighter"))
    with pytest.raises(RunHasForks, match="brighter"):
        plan_deletion(store, RUN)


def test_a_fork_and_a_deletion_at_the_same_time_do_not_both_go_on(store: Store) -> None:
    deletion, before = plan_deletion(store, RUN), open_run(store, RUN).handle
    fork_of(store, "first")
    open_fork = open_run(store, "first")
    with pytest.raises(RunHasForks, match="first"):
        begin_deletion(deletion)
    assert open_run(store, RUN).handle == before  # as if nothing had happened
    store.delete(keys.run_key("first"))
    begin_deletion(deletion)
    with pytest.raises(RunBeingDeleted):
        record_fork(open_fork)


def test_a_start_and_a_deletion_at_the_same_time_do_not_both_go_on(store: Store) -> None:
    config = open_run(store, RUN).config
    storage = config.storage.model_copy(update={"root": store.root})
    plan = check_run(config.model_copy(update={"storage": storage}), RUN)
    deletion = plan_deletion(store, RUN)
    begin_deletion(deletion)
    with pytest.raises(RunBeingDeleted, match=f"ddpo delete {RUN}"):
        plan.start()
    finish_deletion(deletion)
    assert store.list() == []


def test_a_task_of_a_run_whose_start_was_deleted_names_what_is_missing(store: Store) -> None:
    handle = open_run(store, RUN).handle
    store.delete(keys.start_key(RUN, 1))
    with pytest.raises(MissingObject, match=r"00001\.json"):
        handle.open()


def test_nothing_is_deleted_unless_it_is_confirmed(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = store.list()
    assert ddpo(monkeypatch, "delete", RUN, "--root", store.root, answer="n\n") == 0
    assert f"{len(before)} objects" in capsys.readouterr().out
    assert ddpo(monkeypatch, "delete", RUN, "--root", store.root) != 0  # nobody is there to answer
    assert store.list() == before
    assert ddpo(monkeypatch, "delete", RUN, "--root", store.root, answer="y\n") == 0
    assert store.list() == []


def test_a_deletion_killed_anywhere_is_completed_by_the_next(store: Store, tmp_path: Path) -> None:
    config = open_run(store, RUN).config
    deletions = len(store.list()) + 1  # and the record of the deletion
    for at in range(2, deletions + 2):
        copy = Store.open(str(tmp_path / f"copy-{at}"))
        shutil.copytree(tmp_path / "store", tmp_path / f"copy-{at}")
        storage = config.storage.model_copy(update={"root": copy.root})
        with watched(Writes(at)), pytest.raises(Crash):
            deletion = plan_deletion(copy, RUN)
            begin_deletion(deletion)
            finish_deletion(deletion)
        if at > 2:
            assert runs.list_runs(copy) == []
        with pytest.raises(RunBeingDeleted, match=f"ddpo delete {RUN}"):
            start_run(config.model_copy(update={"storage": storage}), RUN)
        deletion = plan_deletion(copy, RUN)
        assert deletion.begun and deletion.record.uid and deletion.record.tracked_at
        begin_deletion(deletion)
        finish_deletion(deletion)
        assert copy.list() == []
    with watched(Writes(deletions + 2)):
        deletion = plan_deletion(store, RUN)
        begin_deletion(deletion)
        finish_deletion(deletion)


def test_what_a_task_wrote_after_the_deletion_can_be_deleted_too(store: Store) -> None:
    for _ in range(2):
        deletion = plan_deletion(store, RUN)
        begin_deletion(deletion)
        finish_deletion(deletion)
        assert store.list() == []
        store.put(f"rollouts/{keys.run_folder(RUN)}/epoch=00009/shard-00000", ".parquet", b"late")


def test_what_is_written_during_the_question_and_the_deletion_is_deleted_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(epoch: int) -> None:
        place = f"{keys.run_folder(RUN)}/epoch={epoch:05}/shard-00000"
        assert store.put_if_absent(f"manifests/rollouts/{place}.json", b"{}")
        store.put(f"rollouts/{place}", ".parquet", b"late")

    def answer(question: str) -> bool:
        write(7)
        return True

    def delete(key: str) -> None:
        if "epoch=00007" in key and key.startswith("rollouts/"):
            write(8)

    monkeypatch.setattr("typer.confirm", answer)
    real = finish_deletion
    monkeypatch.setattr(
        "ddpo.store.upkeep.delete.finish_deletion", lambda deletion, on_key: real(deletion, delete)
    )
    assert ddpo(monkeypatch, "delete", RUN, "--root", store.root) == 0
    assert store.list() == []


def test_a_run_that_is_not_there_is_an_error_with_similar_names(store: Store) -> None:
    with pytest.raises(DdpoError, match=f"Did you mean {RUN}"):
        plan_deletion(store, RUN + "s")


def test_a_page_that_cannot_be_reached_does_not_keep_a_run(
    store: Store,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (finished / "mlflow.db").rename(finished / "away.db")
    try:
        assert ddpo(monkeypatch, "delete", RUN, "--yes", "--root", store.root) == 0
    finally:
        (finished / "away.db").rename(finished / "mlflow.db")
    screen = " ".join(capsys.readouterr().out.split())
    assert "not marked as deleted: there is no database" in screen
    assert store.list() == []


def test_names_of_runs_that_start_in_the_same_second_differ() -> None:
    names = [new_run_id("configs/starter.yaml") for _ in range(500)]
    assert len(set(names)) == 500
    assert all(keys.validate_run_id(name).startswith("starter-") for name in names)
