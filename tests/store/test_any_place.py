"""Any name of a run and any root is refused in one line, or is where everything is found again."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ddpo.errors import DdpoError, InvalidKey
from ddpo.store import runs
from ddpo.store.objects import Store
from ddpo.store.upkeep.probe import probe

PROPERTY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def start(store: Store, run_id: str) -> None:
    identity, numerics = {"name": run_id}, {"threads": 1}
    runs.create_or_check_run(store, run_id, identity=identity, numerics=numerics, code={})
    runs.append_operation(store, run_id, {"epochs": 3})


@PROPERTY
@given(st.text(max_size=110) | st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,105}", fullmatch=True))
@example("a/../b")
@example("..")
@example("a\n")
@example("a" * 101)
@example("ａ")
def test_a_name_is_refused_or_found_again(name: str) -> None:
    store = Store.open("memory://names")
    try:
        start(store, name)
    except InvalidKey as error:
        assert "\n" not in str(error)
        return
    assert runs.load_run(store, name).run_id == name
    assert runs.load_run(store, name).identity == {"name": name}
    assert runs.list_operations(store, name)[-1] == {"epochs": 3}
    assert name in runs.list_runs(store)


@pytest.mark.slow
@PROPERTY
@given(st.text(min_size=1, max_size=20).filter(lambda name: ".." not in name))
@example("run #1")
@example("2025")
@example("a::b")
@example("a?b=c")
@example("*")
@example("[a]")
@example("100%20")
@example("a\\b")
@example(" a ")
@example("a//b/")
@example("~")
@example("$HOME")
@example("a://b")
@example("file:")
@example("a\nb")
@example("\0")
@example("\ud800")
@example("x" * 300)
def test_a_root_is_refused_or_used_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    below = name.strip("/").replace("$HOME", "home") or "x"
    for root in (str(tmp_path / below), f"./{below}"):
        try:
            store = Store.open(root)
            probe(store)
            start(store, "mine")
        except DdpoError as error:
            assert "\n" not in str(error)
            continue
        folder = tmp_path / below
        assert (folder / "runs/mine/run.json").is_file()
        for again in (
            Store.open(root),
            Store.open(store.root),
            Store.open(str(folder)),
            pickle.loads(pickle.dumps(store)),
        ):
            assert again.root == store.root
            assert runs.list_runs(again) == ["mine"]
            assert runs.load_run(again, "mine").identity == {"name": "mine"}
