"""The layout of a store: keys are built here and in `kinds`, and parsed here only.

Keys are relative to the store's root and have Hive-style partitions, which other tools understand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ddpo.basics.limits import EPOCH_LIMIT, INDEX_LIMIT
from ddpo.errors import InvalidKey

PARTITION_NAMES = frozenset({"run_id", "epoch", "reward_name", "pictures_name"})
"""Names of partition keys; no column of a table may share one (pyarrow refuses to merge them)."""
TENSORS_SUFFIX = ".safetensors"
"""Suffix of the checkpoint objects that retention deletes; JSON documents stay."""
MANIFESTS = "manifests"
"""Folder of all manifests."""

RetiredPart = Literal["checkpoints", "trajectories", "samples"]
"""What retention deletes: a checkpoint's tensors; an epoch's trajectories; an epoch's samples
(tables, images, scores and statistics)."""

_ID_RULE = "a letter, then letters, digits, '.', '_' or '-'; 100 characters at most"
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")
_REWARD_ID = re.compile(r"(?=.{10,100}\Z)[A-Za-z][A-Za-z0-9._-]*-[0-9a-f]{8}")
_SEGMENT = re.compile(r"[A-Za-z0-9._=-]{1,200}")
_START = re.compile(r"runs/(?P<run_id>[^/]+)/starts/(?P<number>\d{5})(?P<end>-end)?\.json")
_SAMPLE_ID = re.compile(r"([^/]+)/(\d{5})/(\d{6})")
_PARTITION = (
    r"(?P<tree>[a-z]+(?:/[a-z]+)?)/"
    r"(?:reward_name=(?P<reward>[^/]+)/)?(?:pictures_name=(?P<images>[^/]+)/)?"
    r"run_id=(?P<run_id>[^/]+)/epoch=(?P<epoch>\d{5})"
)
_MANIFEST = re.compile(MANIFESTS + "/" + _PARTITION + r"(?:/shard-(?P<shard>\d{5}))?\.json")
_OBJECT = re.compile(_PARTITION + r"/(?:shard-(?P<shard>\d{5})-)?.+")
_PART = re.compile(r"-\d{5}-of-\d{5}\Z")
_RETIRED_WITH: dict[str, RetiredPart] = {
    "trajectories": "trajectories",
    **dict.fromkeys(("rollouts", "samples", "rewards", "statistics"), "samples"),
}


@dataclass(frozen=True)
class Partition:
    """The part of a store that an artefact belongs to."""

    run_id: str
    """The run."""
    epoch: int
    """The epoch; of a checkpoint, the epoch that starts from it."""
    shard: int | None = None
    """The shard, from 0; None for artefacts of a whole epoch."""
    reward_id: str | None = None
    """The reward, 'NAME-<digest8>', of artefacts that depend on one."""
    images_id: str | None = None
    """The set of fixed prompts and seeds, of images of such a set."""

    def folder(self) -> str:
        """Return the Hive-style folder, without the shard."""
        named = ""
        if self.reward_id is not None:
            named = f"reward_name={validate_reward_id(self.reward_id)}/"
        if self.images_id is not None:
            named += f"pictures_name={self.images_id}/"
        return f"{named}{run_folder(self.run_id)}/epoch={_number(self.epoch, 'epoch')}"

    def of_shard(self, shard: int | None) -> Partition:
        """Return the same partition for one shard, or for the whole epoch (None)."""
        return replace(self, shard=shard)


def check_key(key: str) -> str:
    """Return a key that is safe as a path below the root.

    Raises:
        InvalidKey: Empty or absolute, a segment '', '.' or '..', or a character outside
            [A-Za-z0-9._=-].
    """
    segments = key.split("/")
    if any(s in (".", "..") or not _SEGMENT.fullmatch(s) for s in segments) or len(key) > 900:
        raise InvalidKey(
            "key",
            key,
            "a relative path of segments of letters, digits, '.', '_', '=' or '-', none of them "
            "'.' or '..'",
        )
    return key


def validate_run_id(run_id: str) -> str:
    """Return a valid run id.

    Raises:
        InvalidKey: It does not start with a letter (a number would be read as an int partition),
            or has a character outside [A-Za-z0-9._-], or more than 100 characters.
    """
    if not _ID.fullmatch(run_id):
        raise InvalidKey("run id", run_id, _ID_RULE)
    return run_id


def validate_reward_id(reward_id: str) -> str:
    """Return a valid reward id.

    Raises:
        InvalidKey: It is not 'NAME-<digest8>' in the characters that a run id may have.
    """
    if not _REWARD_ID.fullmatch(reward_id):
        raise InvalidKey(
            "reward id", reward_id, f"NAME-<8 hex digits of its digest>, as a whole {_ID_RULE}"
        )
    return reward_id


# Samples


def sample_id(run_id: str, epoch: int, index: int) -> str:
    """Return the id of a sample, 'R/00003/000017'; `index` counts within the epoch."""
    return f"{validate_run_id(run_id)}/{_number(epoch, 'epoch')}/{_index(index)}"


def parse_sample_id(text: str) -> tuple[str, int, int] | None:
    """Return the run, epoch and index of a sample id; None if the text is not one."""
    match = _SAMPLE_ID.fullmatch(text)
    return (match[1], int(match[2]), int(match[3])) if match else None


def image_name(index: int) -> str:
    """Return the file name that a table gives a sample's image, '000017.png'."""
    return f"{_index(index)}.png"


# Runs


def run_key(run_id: str) -> str:
    """Return the key of a run's record."""
    return f"runs/{validate_run_id(run_id)}/run.json"


def run_of_record(key: str) -> str | None:
    """Return the run whose record has this key; None for other keys."""
    parts = key.split("/")
    return parts[1] if len(parts) == 3 and (parts[0], parts[2]) == ("runs", "run.json") else None


def start_key(run_id: str, number: int) -> str:
    """Return the key of the record of a run's start, counted from 1."""
    return f"{starts_prefix(run_id)}/{_number(number, 'start number')}.json"


def end_key(run_id: str, number: int) -> str:
    """Return the key of the record of how a run's start ended."""
    return start_key(run_id, number).removesuffix(".json") + "-end.json"


def start_of_record(key: str) -> tuple[str, int, bool] | None:
    """Return run and number of the start that a record is of, and whether it is of its end.

    None for other keys.
    """
    match = _START.fullmatch(key)
    return (match["run_id"], int(match["number"]), bool(match["end"])) if match else None


def starts_prefix(run_id: str) -> str:
    """Return the folder of the records of a run's starts and of how they ended."""
    return f"runs/{validate_run_id(run_id)}/starts"


def fork_key(run_id: str, fork: str) -> str:
    """Return the key of the record of a run's fork."""
    return f"{forks_prefix(run_id)}/{validate_run_id(fork)}.json"


def fork_of_record(key: str) -> str:
    """Return the fork that a record below `forks_prefix` names."""
    return key.rpartition("/")[2].removesuffix(".json")


def forks_prefix(run_id: str) -> str:
    """Return the folder of the records of a run's forks."""
    return f"runs/{validate_run_id(run_id)}/forks"


def fork_records(found: Iterable[str], fork: str) -> list[str]:
    """Return those of the keys that record a fork beside its parent."""
    name = f"{validate_run_id(fork)}.json"
    return [key for key in found if key.split("/")[2:] == ["forks", name]]


def deletion_key(run_id: str) -> str:
    """Return the key of the record that a run is being deleted."""
    return f"runs/{validate_run_id(run_id)}/deletion.json"


def lease_key(run_id: str) -> str:
    """Return the key of the lease of the process that trains a run."""
    return f"runs/{validate_run_id(run_id)}/lease.json"


def run_folder(run_id: str) -> str:
    """Return the name of a run's folder within a tree."""
    return f"run_id={validate_run_id(run_id)}"


def belongs_to(key: str, run_id: str) -> bool:
    """Return whether a key lies in a folder of a run's artefacts; unfinished writes count too."""
    return run_folder(run_id) in key.split("/")


def is_record_of(key: str, run_id: str) -> bool:
    """Return whether a key is one of the records of a run; unfinished writes count too."""
    return key.startswith(f"runs/{validate_run_id(run_id)}/")


# Artefacts; their kinds are in `kinds`.


def manifest_key(tree: str, where: Partition) -> str:
    """Return the key of a manifest."""
    shard = "" if where.shard is None else f"/{_shard(where.shard)}"
    return f"{MANIFESTS}/{tree}/{where.folder()}{shard}.json"


def parse_manifest(key: str) -> tuple[str, Partition] | None:
    """Return the tree and the partition of a manifest's key; None for other keys."""
    return _parsed(_MANIFEST, key)


def manifest_folder(
    tree: str,
    run_id: str | None = None,
    epoch: int | None = None,
    reward_id: str | None = None,
    *,
    by_set: bool = False,
) -> str:
    """Return the smallest folder that contains all manifests with these partition values.

    Args:
        tree: The tree.
        run_id: The run; None for all.
        epoch: The epoch; None for all.
        reward_id: The reward; None for all.
        by_set: Whether a reward or a set of images comes before the run in this tree's keys.
    """
    folder = f"{MANIFESTS}/{tree}"
    if by_set:
        if reward_id is None:
            return folder
        folder = f"{folder}/reward_name={validate_reward_id(reward_id)}"
    if run_id is None:
        return folder
    folder = f"{folder}/{run_folder(run_id)}"
    return folder if epoch is None else f"{folder}/epoch={_number(epoch, 'epoch')}"


def is_manifest(key: str) -> bool:
    """Return whether a key is below the folder of manifests."""
    return key.startswith(f"{MANIFESTS}/")


def part_role(role: str, number: int, count: int) -> str:
    """Return the role of one of the files that make up an object: 'weights-00001-of-00003'.

    Args:
        role: The object's role, which a single file has too.
        number: The file, from 1.
        count: Number of files.
    """
    return role if count == 1 else f"{role}-{number:05d}-of-{count:05d}"


def whole_role(role: str) -> str:
    """Return the role of the object that a role of `part_role` belongs to."""
    return _PART.sub("", role)


def object_stem(tree: str, where: Partition, name: str) -> str:
    """Return the stem of a data object; `Store.put` appends the digest and the suffix.

    Args:
        tree: The top folder.
        where: The partition.
        name: The object's name within an epoch; a shard's object is named after the shard.
    """
    return check_key(
        f"{tree}/{where.folder()}/{name if where.shard is None else _shard(where.shard)}"
    )


def parse_object(key: str) -> tuple[str, Partition] | None:
    """Return the tree and the partition of a data object's key; None for other keys."""
    return None if is_manifest(key) else _parsed(_OBJECT, key)


# Retention


def retired_key(part: RetiredPart, run_id: str, epoch: int) -> str:
    """Return the key of the record that a part of an epoch was deleted on purpose."""
    return manifest_key(f"retired/{part}", Partition(run_id, epoch))


def retirement_of(key: str) -> str | None:
    """Return the key of the record that would explain why an object is missing.

    None for objects that retention never deletes.
    """
    parsed = parse_object(key)
    if parsed is None:
        return None
    tree, where = parsed
    part = _RETIRED_WITH.get(tree)
    if tree == "checkpoints" and key.endswith(TENSORS_SUFFIX):
        part = "checkpoints"
    return None if part is None else retired_key(part, where.run_id, where.epoch)


def _parsed(pattern: re.Pattern[str], key: str) -> tuple[str, Partition] | None:
    match = pattern.fullmatch(key)
    if match is None:
        return None
    shard = None if match["shard"] is None else int(match["shard"])
    where = Partition(match["run_id"], int(match["epoch"]), shard, match["reward"], match["images"])
    return match["tree"], where


def _shard(shard: int) -> str:
    return f"shard-{_number(shard, 'shard')}"


def _number(value: int, what: str) -> str:
    if not 0 <= value < EPOCH_LIMIT:
        raise InvalidKey(what, value, f"0 to {EPOCH_LIMIT - 1}")
    return f"{value:05d}"


def _index(index: int) -> str:
    if not 0 <= index < INDEX_LIMIT:
        raise InvalidKey("sample index", index, f"0 to {INDEX_LIMIT - 1}")
    return f"{index:06d}"
