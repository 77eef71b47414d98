from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddpo.errors import CorruptObject, InvalidKey, RunIdentityMismatch, RunNotFound
from ddpo.store import runs
from ddpo.store.objects import Store

IDENTITY = {"seed": 1, "optimizer": {"learning_rate": 3e-4, "betas": [0.9, 0.999]}, "model": "sd"}


def start(store: Store, run_id: str = "R", threads: int = 2, **identity: object) -> runs.RunRecord:
    return runs.create_or_check_run(
        store,
        run_id,
        identity={**IDENTITY, **identity},
        numerics={"threads": threads},
        code={"version": "0.1"},
    )


def test_a_resumed_run_gets_the_numerics_that_its_first_start_froze(store: Store) -> None:
    first = start(store, threads=2)
    again = start(store, threads=16)
    assert again == first == runs.load_run(store, "R")
    assert again.numerics == {"threads": 2}
    document = json.loads(store.read("runs/R/run.json"))
    assert document.pop("checksum")
    assert document == {
        "schema_version": 1,
        "run_id": "R",
        "identity": IDENTITY,
        "numerics": {"threads": 2},
        "code": {"version": "0.1"},
    }


def test_another_identity_is_refused_with_each_difference_by_dotted_key(store: Store) -> None:
    start(store)
    with pytest.raises(RunIdentityMismatch) as caught:
        start(store, optimizer={"learning_rate": 0.001, "betas": [0.9, 0.999], "eps": 1}, seed=1)
    assert [str(difference) for difference in caught.value.differences] == [
        "optimizer.eps: absent in the store, 1 in the config",
        "optimizer.learning_rate: 0.0003 in the store, 0.001 in the config",
    ]
    message = str(caught.value)
    assert "optimizer.learning_rate: 0.0003 in the store, 0.001 in the config" in message
    assert "--run-id" in message
    assert "seed" not in message


def test_a_long_value_that_differs_late_is_shown_short_but_told_apart(store: Store) -> None:
    start(store, prompts=["lynx"] * 1000)
    with pytest.raises(RunIdentityMismatch) as caught:
        start(store, prompts=[*["lynx"] * 999, "wolf"])
    (difference,) = caught.value.differences
    assert difference.stored != difference.wanted
    assert len(str(caught.value)) < 1000


def test_racing_first_starts_agree_on_one_record(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda threads: start(store, threads=threads), range(8)))
    assert len({record.model_dump_json() for record in records}) == 1


def test_an_unknown_run_is_named_with_the_nearest(store: Store) -> None:
    for run_id in ("cats-1", "cats-2", "zebra"):
        start(store, run_id)
    assert runs.list_runs(store) == ["cats-1", "cats-2", "zebra"]
    with pytest.raises(RunNotFound) as caught:
        runs.load_run(store, "cat-1")
    assert caught.value.nearest[0] == "cats-1"
    assert "zebra" not in caught.value.nearest
    assert "Did you mean cats-1" in str(caught.value)


def test_a_store_without_runs_lists_none(store: Store) -> None:
    assert runs.list_runs(store) == []
    with pytest.raises(RunNotFound, match=store.root):
        runs.load_run(store, "R")
    with pytest.raises(InvalidKey):
        runs.load_run(store, "../R")


def test_edited_numerics_are_never_used(store: Store) -> None:
    start(store)
    edited = store.read("runs/R/run.json").replace(b'"threads":2', b'"threads":3')
    store.delete("runs/R/run.json")
    store.put_if_absent("runs/R/run.json", edited)
    for read in (lambda: start(store), lambda: runs.load_run(store, "R")):
        with pytest.raises(CorruptObject, match=r"runs/R/run\.json"):
            read()


def test_each_start_appends_its_operation(store: Store) -> None:
    start(store)
    for epochs in (10, 20):
        runs.append_operation(store, "R", {"epochs": epochs})
    assert store.list("runs/R/starts") == ["runs/R/starts/00001.json", "runs/R/starts/00002.json"]
    assert runs.list_operations(store, "R") == [{"epochs": 10}, {"epochs": 20}]
    assert runs.list_runs(store) == ["R"]


def test_racing_starts_each_keep_their_operation(raced_store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: runs.append_operation(raced_store, "R", number), range(8)))
    assert len(raced_store.list("runs/R/starts")) == 8
    assert set(map(str, runs.list_operations(raced_store, "R"))) == set("01234567")
