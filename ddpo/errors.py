"""The project's errors.

Every message says what was found, what was expected, and the way out. The parts of a message are
attributes too, so that no caller parses text. All errors survive pickling, since workers report
them across processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DdpoError(Exception):
    """Base of all errors of this project."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[DdpoError], args: tuple[Any, ...], state: dict[str, Any]) -> DdpoError:
    """Unpickle an error without calling its `__init__`, whose arguments are not `args`."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class StoreError(DdpoError):
    """Base of the errors of the object store."""


class StoreNotWritable(StoreError):
    """The store lacks what a commit needs: exclusive creation, reading, listing, deletion."""

    def __init__(self, root: str, reason: str, way_out: str) -> None:
        self.root = root
        self.reason = reason
        super().__init__(
            f"the store {root} failed its probe: {reason}. Expected: a new object can be created "
            f"once, read back, listed and deleted. {way_out}"
        )


class StoreCallFailed(StoreError):
    """A call to the store failed for a possibly transient reason: no space, access or response."""

    def __init__(self, call: str, key: str, root: str, reason: str, way_out: str) -> None:
        self.call = call
        self.key = key
        self.reason = reason
        self.way_out = way_out
        super().__init__(
            f"could not {call} {key or 'its objects'} in {root}: {reason}. {way_out}. What is "
            "committed is kept, and nothing half-written is ever read"
        )


class StoreUnavailable(StoreCallFailed):
    """The store did not answer, or answered that it is busy, for as long as the caller waits."""


class StoreRefused(StoreCallFailed):
    """The store refused a call: no permission, or no valid credentials."""


class InvalidKey(StoreError):
    """A key, or an id that becomes part of one, contains something that is not allowed."""

    def __init__(self, what: str, found: object, expected: str) -> None:
        self.found = found
        super().__init__(f"{what} {found!r} is not allowed. Expected: {expected}.")


class CorruptObject(StoreError):
    """The bytes under a key are not those that were committed."""

    def __init__(self, key: str, expected: str, found: str) -> None:
        self.key = key
        self.expected = expected
        self.found = found
        super().__init__(
            f"object {key} is corrupt: expected sha256 {expected}, found {found}. Restore it "
            "from a copy, or delete it and the manifest that lists it, so that it is recomputed"
        )


class MissingObject(StoreError):
    """There is nothing under a key that should hold an object."""

    def __init__(self, key: str, root: str) -> None:
        self.key = key
        self.root = root
        super().__init__(
            f"nothing under the key {key} in {root}, where an object was expected. Check that this "
            "is the right store; restore the object from a copy, or delete the manifest that lists "
            "it, so that it is recomputed"
        )


class RetiredObject(MissingObject):
    """The object was deleted on purpose, by retention."""

    def __init__(self, key: str, root: str, retired_key: str) -> None:
        super().__init__(key, root)
        self.retired_key = retired_key
        self.args = (
            f"object {key} was deleted from {root} by retention, as {retired_key} records. Use an "
            "epoch or a checkpoint that is kept, or keep more of them in the next run "
            "(storage.retention, storage.keep_newest_checkpoints)",
        )


class UnreadableData(StoreError):
    """Bytes that should be a manifest, a table, tensors or an image cannot be parsed."""

    def __init__(self, what: str, reason: str) -> None:
        self.what = what
        self.reason = reason
        super().__init__(
            f"cannot read {what}: {reason}. The bytes are damaged, or were not written by this "
            "project; restore them from a copy"
        )


class UnknownSchema(StoreError):
    """A document has a schema version unknown to this release."""

    def __init__(self, key: str, found: object, expected: int) -> None:
        self.key = key
        self.found = found
        self.expected = expected
        super().__init__(
            f"{key} has schema version {found!r}, this release reads {expected}. Use the release "
            "of ddpo that wrote it, or a newer one"
        )


class InvalidTable(StoreError):
    """Rows cannot be written as a table: duplicate samples, clashing columns, mixed types."""

    def __init__(self, table: str, found: str, expected: str) -> None:
        self.table = table
        super().__init__(f"rows of the {table} table have {found}. Expected: {expected}")


class ConflictingCommit(StoreError):
    """A manifest with other inputs is already committed under the key."""

    def __init__(self, key: str, differences: Sequence[Any]) -> None:
        self.key = key
        self.differences = tuple(differences)
        lines = "".join(f"\n  {difference}" for difference in self.differences)
        super().__init__(
            f"{key} is already committed, made from other inputs:{lines}\nA commit is never "
            "overwritten. Use another --run-id, or the inputs that are in the store"
        )


class RunIdentityMismatch(StoreError):
    """A run exists with another identity than the config's."""

    def __init__(self, run_id: str, differences: Sequence[Any]) -> None:
        self.run_id = run_id
        self.differences = tuple(differences)
        lines = "".join(f"\n  {difference}" for difference in self.differences)
        super().__init__(
            f"run {run_id!r} exists with another identity:{lines}\nThe identity of a run never "
            "changes. Start another run (another --run-id), or go back to the stored values"
        )


class RunNotFound(StoreError):
    """The store has no run of this id."""

    def __init__(self, run_id: str, root: str, nearest: Sequence[str]) -> None:
        self.run_id = run_id
        self.nearest = tuple(nearest)
        names = ", ".join(self.nearest)
        hint = f"Did you mean {names}?" if names else "No run has a similar name."
        super().__init__(
            f"no run {run_id!r} in {root}. {hint} Check --root (or DDPO_ROOT); `ddpo runs` lists "
            "the runs of a store"
        )


class RunBeingDeleted(RunNotFound):
    """The run's deletion has begun, and was interrupted or has not finished yet."""

    def __init__(self, run_id: str, root: str) -> None:
        super().__init__(run_id, root, ())
        self.args = (
            f"run {run_id!r} in {root} is being deleted. Complete the deletion with "
            f"`ddpo delete {run_id}`; its name is free afterwards",
        )


class RunBeingTrained(StoreError):
    """Another process trains the run."""

    def __init__(self, run_id: str, owner: str) -> None:
        self.run_id = run_id
        self.owner = owner
        super().__init__(
            f"run {run_id!r} is being trained by {owner}. Wait until that process has ended "
            f"(`ddpo watch {run_id}`), or stop it first; what it has committed is kept"
        )


class GpuInUse(DdpoError):
    """Another run trains on a GPU that a run would train on."""

    def __init__(self, gpu: str, owner: str, engine: str) -> None:
        self.gpu = gpu
        self.owner = owner
        super().__init__(
            f"the GPU {gpu} is in use by {owner}. Two runs on one GPU slow each other down, and "
            "may run out of memory. Wait until that one has ended, give this one another GPU "
            "(CUDA_VISIBLE_DEVICES=1), or let it share: "
            f"--set 'engine={{type: {engine}, share_gpu: true}}'"
        )


class RunNotStarted(StoreError):
    """A run whose first start was stopped before it recorded how it is operated."""

    def __init__(self, run_id: str, root: str) -> None:
        self.run_id = run_id
        super().__init__(
            f"run {run_id!r} in {root} was stopped before its settings were recorded, such as the "
            "number of epochs. Start it with its config, with the same command as before: "
            f"`ddpo train CONFIG --run-id {run_id}`, or `ddpo fork` for a fork"
        )


class RunHasForks(StoreError):
    """A run cannot be deleted, since its forks refer to its data."""

    def __init__(self, run_id: str, forks: Sequence[str]) -> None:
        self.run_id = run_id
        self.forks = tuple(forks)
        super().__init__(
            f"run {run_id!r} cannot be deleted: the first samples and the first checkpoint of "
            f"{', '.join(forks)}, forked from it, are stored with it. Delete these forks first "
            f"(`ddpo delete {forks[0]}`), or keep the run and let storage.retention shrink it"
        )


class NotInHistory(StoreError):
    """A requested sample, epoch or reward that the run has not committed."""


class ModelError(DdpoError):
    """A model is not available, or is not one that this project trains."""


class NonFiniteError(DdpoError):
    """A NaN or infinity occurred; the run stopped before it reached the weights."""


class PolicyMismatch(DdpoError):
    """Rollouts were sampled from another policy or sampler than the one being updated."""


class ConfigError(DdpoError):
    """A configuration that cannot be run, found before anything is loaded."""


class NotTrusted(DdpoError):
    """A run from elsewhere names code, an address or a file that only a trusted run may use."""

    def __init__(self, run: str, what: str) -> None:
        self.run = run
        super().__init__(
            f"{run} was not started on this machine, and {what}. If you trust whoever wrote it, "
            "pass --trust once (in a form, tick `trust`)"
        )


class UploadFailed(DdpoError):
    """Files were written, but could not be uploaded."""


class QueryError(DdpoError):
    """A query that cannot be answered as written."""


class MissingPackage(DdpoError):
    """A command needs an optional package that is not installed."""

    def __init__(self, package: str, what: str, extra: str) -> None:
        self.package = package
        super().__init__(
            f"{what} needs the package {package}, which is not installed; in the checkout, run "
            f"pip install -e '.[{extra}]'"
        )


class RewardError(DdpoError):
    """A reward raised, or returned invalid scores."""

    reason: str = ""
    """The message of a served reward itself, without its address: the same as in process."""


class UnusableScores(RewardError):
    """A reward returned something that is not one number per image."""


class RewardUnavailable(RewardError):
    """A reward is temporarily unreachable: worth a retry, and not the fault of an image."""


class InvalidRetention(StoreError):
    """A retention rule could delete the state from which a run resumes."""

    def __init__(self, keep_newest: int, keep_every: int | None) -> None:
        super().__init__(
            f"retention keeps the newest {keep_newest} checkpoints and every {keep_every}. "
            "Expected: at least 1 of each (keep_every may be None), or the run could not resume"
        )
