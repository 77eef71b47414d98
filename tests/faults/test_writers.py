"""Sixteen tasks draw one shard at once, as after a lost heartbeat: one wins, all adopt it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ddpo_workflow.tasks.sample
from ddpo.basics.digests import sha256_bytes
from ddpo.diffusion.sampling import sample
from ddpo.runs import start_run
from ddpo.store import manifests
from ddpo.store.manifests import Committed, Ref
from ddpo.store.objects import Store
from ddpo_workflow.tasks.sample import shard_of
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.worker import Lease, RunHandle, policy_at
from tests.servers import BUCKET, ObjectStore
from tests.tiny import tiny_config

WRITERS = 16


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "disk":
        return str(tmp_path / "store")
    server: ObjectStore = request.getfixturevalue("seaweedfs")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.mark.parametrize("bytes_differ", [False, True], ids=["same bytes", "other bytes"])
def test_of_sixteen_writers_of_a_shard_one_wins_and_all_adopt_it(
    tiny_model: Path, root: str, bytes_differ: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(tiny_config(tiny_model, storage={"root": root}), "r")
    checkpoint = start.fn(RunHandle(root=root, run_id="r"))
    own = threading.local()

    @contextmanager
    def shared(*_: object, **__: object) -> Iterator[Lease]:
        # The model is one to a process: drawn with beforehand, so that the writers meet below.
        yield lease

    with policy_at(run, checkpoint) as lease:
        indices = range(run.config.rollouts.shard_size)
        texts = [ddpo_workflow.tasks.sample.prompt_of(run, 0, index).text for index in indices]
        drawn = sample(lease.policy, texts, list(indices), run.config.sampler)

    def draws(*_: object, **__: object) -> Any:
        # As another GPU rounds: one more in the last place.
        return replace(drawn, log_probs=drawn.log_probs + own.number * 1e-6 * bytes_differ)

    monkeypatch.setattr(ddpo_workflow.tasks.sample, "policy_at", shared)
    monkeypatch.setattr(ddpo_workflow.tasks.sample, "sample", draws)
    together = threading.Barrier(WRITERS)
    commit, create = manifests.commit, Store.put_if_absent
    outcomes: list[Committed] = []
    created: list[bool] = []

    def commit_together(*arguments: Any, **named: Any) -> Committed:
        together.wait(60)
        outcomes.append(commit(*arguments, **named))
        return outcomes[-1]

    def counted(*arguments: Any) -> bool:
        created.append(create(*arguments))
        return created[-1]

    monkeypatch.setattr(manifests, "commit", commit_together)
    monkeypatch.setattr(Store, "put_if_absent", counted)

    def write(number: int) -> Ref:
        own.number = number
        return shard_of(replace(run, store=Store.open(root)), checkpoint, 0, 0)

    with ThreadPoolExecutor(WRITERS) as pool:
        refs = list(pool.map(write, range(WRITERS)))
    assert len(created) == WRITERS and sum(created) == 1
    assert {*refs} == {outcome.ref for outcome in outcomes} and len({*refs}) == 1
    assert sum(outcome.diverged for outcome in outcomes) == (WRITERS - 1 if bytes_differ else 0)
    committed = manifests.load(run.store, outcomes[0].ref)
    for stored in committed.objects.values():
        assert run.store.get(stored)
    # What the others wrote lies beside it, each under its own digest; nothing was overwritten.
    trajectories = run.store.list("trajectories")
    assert len(trajectories) == (WRITERS if bytes_differ else 1)
    for key in trajectories:
        assert sha256_bytes(run.store.read(key))[:12] in key
