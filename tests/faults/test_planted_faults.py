"""Bugs in durability, planted on purpose: each turns a check of this folder red.

The same check is green on the right code; so the harness sees what it is there to see.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ddpo_workflow.tasks.sample
from ddpo.errors import MissingObject
from ddpo.store import manifests
from ddpo.store.backends import Maker
from ddpo.store.manifests import Committed
from ddpo.store.objects import Store, StoredObject
from tests.faults.crashes import Night, Writes, watched

Plan = Callable[[str], Night]


@pytest.fixture
def plan(tiny_model: Path, tmp_path: Path, mlflow_database: Path) -> Plan:
    def of(name: str) -> Night:
        folder = tmp_path / name
        return Night.plan(tiny_model, str(folder / "store"), folder, mlflow_database)

    return of


def check_a_crash_before_each_rollout_write(plan: Plan) -> None:
    """Crash before and after the writes of the first shard; compare the resumed run."""
    whole = plan("whole")
    with watched(Writes()) as writes:
        whole.go()
    shard = [
        at
        for at, name in enumerate(writes.made, 1)
        if re.search(r"^(write|write_file|create) .*=00000/shard-00000", name)
        and re.search("(rollouts|samples|trajectories)/", name)
    ]
    assert len(shard) == 4  # three objects and their manifest
    for at, moment in itertools.product(shard, ("before", "after")):
        crashed = plan(f"crash-{at}-{moment}")
        crashed.crash(at, moment)
        crashed.go()
        assert crashed.content() == whole.content(), "other bytes after a crash"


def check_damage_is_named(plan: Plan) -> None:
    """Swap two shards' trajectories; going on with the run names one of them."""
    night = plan("damaged")
    with watched(Writes()) as writes:
        night.go()
    update = next(i for i, name in enumerate(writes.made, 1) if "epoch=00002/weights" in name)
    again = plan("again")
    again.crash(update, "before")
    first, second = again.store.list("trajectories/run_id=night/epoch=00001")
    one, other = again.store.read(first), again.store.read(second)
    again.store.replace(first, other)
    again.store.replace(second, one)
    try:
        again.go()
    except manifests.CorruptObject as error:
        assert error.key == first
        return
    raise AssertionError("an update on damaged trajectories went through")


def manifest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write objects only when their manifest is committed."""
    waiting: list[tuple[Store, str, str, bytes | Maker]] = []
    put, commit = Store.put, manifests.commit

    def later(self: Store, stem: str, suffix: str, data: bytes | Maker) -> StoredObject:
        if not stem.startswith(("rollouts", "samples", "trajectories")):
            return put(self, stem, suffix, data)
        waiting.append((self, stem, suffix, data))
        if not isinstance(data, bytes):
            with tempfile.NamedTemporaryFile() as file:
                data(Path(file.name))
                data = Path(file.name).read_bytes()
        digest = manifests.sha256_bytes(data)
        return StoredObject(
            key=f"{stem}-{digest[:12]}{suffix}", size=len(data), sha256=digest
        )  # fmt: skip

    def early(
        store: Store, key: str, *, kind: str, inputs: Mapping[str, Any],
        objects: Mapping[str, StoredObject],
    ) -> Committed:  # fmt: skip
        done = commit(store, key, kind=kind, inputs=inputs, objects=objects)
        while waiting:
            put(*waiting.pop(0))
        return done

    monkeypatch.setattr(Store, "put", later)
    monkeypatch.setattr(manifests, "commit", early)


def trust_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read objects without comparing digests."""
    monkeypatch.setattr(Store, "get", lambda self, stored: self.read(stored.key))
    monkeypatch.setattr(
        Store, "load", lambda self, stored: np.frombuffer(bytearray(self.read(stored.key)), "u1")
    )
    monkeypatch.setattr(Store, "fetch", _unverified)


@contextmanager
def _unverified(self: Store, stored: StoredObject) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(self.read(stored.key))
        yield Path(file.name)


def draw_noise_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed noise from a generator that starts with the process, and is restored by nobody."""
    started: list[Any] = []
    monkeypatch.setattr("tests.faults.crashes.as_in_a_new_process", _forgetting(started))

    def next_seed(seed: int, *purpose: object) -> int:
        if not started:
            started.append(itertools.count(seed))
        return next(started[0])

    monkeypatch.setattr(ddpo_workflow.tasks.sample, "derive_seed", next_seed)


def _forgetting(started: list[Any]) -> Callable[[], None]:
    from tests.fold import as_in_a_new_process

    def forget() -> None:
        started.clear()
        as_in_a_new_process()

    return forget


@pytest.mark.slow
def test_planted_bugs_turn_the_check_of_crashes_red(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_a_crash_before_each_rollout_write(lambda name: plan(f"right/{name}"))
    with monkeypatch.context() as planted:
        manifest_first(planted)
        with pytest.raises(MissingObject, match="nothing under the key"):
            check_a_crash_before_each_rollout_write(lambda name: plan(f"early/{name}"))
    draw_noise_from_the_process(monkeypatch)
    with pytest.raises(AssertionError, match="other bytes"):
        check_a_crash_before_each_rollout_write(lambda name: plan(f"unseeded/{name}"))


@pytest.mark.slow
def test_a_digest_that_is_not_checked_turns_the_check_of_damage_red(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_damage_is_named(lambda name: plan(f"right/{name}"))
    trust_what_is_read(monkeypatch)
    with pytest.raises(AssertionError, match="went through"):
        check_damage_is_named(lambda name: plan(f"wrong/{name}"))
