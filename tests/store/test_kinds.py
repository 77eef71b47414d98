"""Typed references, and what a kind of artefact finds, makes and refuses."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import pytest
from prefect import flow
from pydantic import TypeAdapter

from ddpo.errors import ConflictingCommit, UnreadableData
from ddpo.store.artefacts import RolloutShard
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, ROLLOUTS, SCORES, committed, open_ref
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects, Store
from ddpo.store.tables import decode_rollouts, encode_rollouts, encode_samples
from tests.store.store_samples import rollout_rows

WHERE = Partition("R", 0, 0)


@pytest.fixture
def memory() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def shard() -> Objects:
    rows = rollout_rows()
    return {"rollouts": encode_rollouts(rows), "samples": encode_samples(rows)}


def test_what_is_committed_is_found_and_not_made_again(memory: Store) -> None:
    made = []

    def make() -> Objects:
        made.append(1)
        return shard()

    refs = {committed(memory, ROLLOUTS, WHERE, {"seed": 1}, make) for _ in range(3)}
    assert len(refs) == len(made) == 1
    with pytest.raises(ConflictingCommit, match="seed: 1 in the store, 2"):
        committed(memory, ROLLOUTS, WHERE, {"seed": 2}, make)
    assert len(made) == 1


def test_the_samples_of_a_shard_are_its_rows_without_the_images(memory: Store) -> None:
    ref = committed(memory, ROLLOUTS, WHERE, {}, shard)
    opened = ROLLOUTS.load(memory, ref)
    rows = decode_rollouts(memory.get(opened.objects["rollouts"]))
    memory.delete(opened.objects["rollouts"].key)
    for sample, row in zip(opened.samples(), rows, strict=True):
        assert vars(sample) == {k: v for k, v in vars(row).items() if k != "image_png"}


def test_a_reference_to_another_kind_is_refused_and_names_both(memory: Store) -> None:
    ref = committed(memory, ROLLOUTS, WHERE, {}, shard)
    with pytest.raises(UnreadableData, match="commits 'rollouts', expected 'rewards'"):
        SCORES.load(memory, ref)  # pyright: ignore[reportArgumentType]  # the point of the types
    assert isinstance(open_ref(memory, ref), RolloutShard)


def test_references_are_one_class_whatever_they_refer_to(memory: Store) -> None:
    ref = committed(memory, ROLLOUTS, WHERE, {}, shard)
    read = TypeAdapter(Ref[RolloutShard]).validate_json(ref.model_dump_json())
    assert read == ref and {read} == {ref}
    assert ref.model_dump().keys() == {"key", "sha256"}


def test_a_flow_takes_the_references_that_tasks_return(memory: Store) -> None:
    """Prefect validates a flow's parameters against their annotations."""
    shards = [committed(memory, ROLLOUTS, WHERE.of_shard(n), {}, shard) for n in range(2)]
    state = CHECKPOINT.commit(memory, Partition("R", 0), {}, {}).ref

    def body(checkpoint: Ref[Checkpoint], rollouts: Sequence[Ref[RolloutShard]]) -> None: ...

    taken = flow(body).validate_parameters({"checkpoint": state, "rollouts": shards})
    assert taken == {"checkpoint": state, "rollouts": shards}
    assert flow(body).validate_parameters(
        {"checkpoint": state.model_dump(), "rollouts": [ref.model_dump() for ref in shards]}
    ) == {"checkpoint": state, "rollouts": shards}
