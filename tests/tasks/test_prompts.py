"""A shard is read once for its scores and its prompts, and anew by a process that knows neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpo.errors import MissingObject
from ddpo.store import keys, manifests
from ddpo.store.tables import decode_prompts
from ddpo_workflow.tasks import prompts
from ddpo_workflow.tasks.prompts import prompts_of
from tests.fold import as_in_a_new_process
from tests.recorded import SHARDS, record_run, score_again


def test_a_process_that_has_scored_a_shard_reads_its_pictures_no_second_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record_run(tiny_model, tmp_path / "store")
    as_in_a_new_process()
    found = [
        manifests.find(run.store, keys.rollout_manifest_key(run.run_id, 1, shard))
        for shard in range(SHARDS)
    ]
    shards = [each for each in found if each]
    tables = [shard.manifest.objects["rollouts"] for shard in shards]
    expected = [decode_prompts(run.store.get(table)) for table in tables]
    assert [prompts_of(run, shard.ref) for shard in shards] == expected
    score_again(run, "colorfulness", range(1, 2))
    for table in tables:
        run.store.delete(table.key)
    assert [prompts_of(run, shard.ref) for shard in shards] == expected

    # The oldest gives way, and is read from the store, where it is gone.
    monkeypatch.setattr(prompts, "_MOST_SHARDS", 1)
    prompts.remember_prompts(shards[1].ref, expected[1])
    assert prompts_of(run, shards[1].ref) == expected[1]
    with pytest.raises(MissingObject):
        prompts_of(run, shards[0].ref)
    as_in_a_new_process()
    with pytest.raises(MissingObject):
        prompts_of(run, shards[1].ref)
