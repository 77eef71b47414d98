from __future__ import annotations

import pickle

import pytest

from ddpo import errors
from ddpo.store.documents import Difference

EXAMPLES = [
    errors.StoreNotWritable("file:///a", "no space", "Free some"),
    errors.StoreCallFailed("write", "a/b", "s3://a", "SlowDown", "Wait"),
    errors.StoreUnavailable("write", "a/b", "s3://a", "timed out", "Start it"),
    errors.StoreRefused("write", "a/b", "s3://a", "AccessDenied", "Check the keys"),
    errors.InvalidKey("key", "..", "a key"),
    errors.CorruptObject("a/b", "0" * 64, "1" * 64),
    errors.MissingObject("a/b", "file:///a"),
    errors.RetiredObject("a/b", "file:///a", "retired/a"),
    errors.UnreadableData("a table", "no footer"),
    errors.UnknownSchema("a/b", 2, 1),
    errors.InvalidTable("rewards", "this", "that"),
    errors.ConflictingCommit("a/b", [Difference("x", "1", "2")]),
    errors.RunIdentityMismatch("R", [Difference("x", "1", "2")]),
    errors.RunNotFound("R", "file:///a", ["S"]),
    errors.RunBeingDeleted("R", "file:///a"),
    errors.RunBeingTrained("R", "process 7 on host"),
    errors.RunNotStarted("R", "file:///a"),
    errors.RunHasForks("R", ["S"]),
    errors.InvalidRetention(0, None),
    errors.NotInHistory("R has no epoch 7"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_cross_processes_with_message_and_parts(error: errors.StoreError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_every_store_error_is_among_the_examples() -> None:
    def below(kind: type) -> set[type]:
        return {kind}.union(*(below(sub) for sub in kind.__subclasses__()))

    named = {kind for kind in below(errors.StoreError) if kind.__module__ == errors.__name__}
    assert named - {type(error) for error in EXAMPLES} == {errors.StoreError}
