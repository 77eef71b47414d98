"""The layout of a store: every key is made here, and every key that is read is checked here.

Keys are relative to the store's root, with Hive-style partitions that other tools understand.
"""

from __future__ import annotations

import re

from ddpo.errors import InvalidKey

EPOCH_LIMIT = 100_000
"""Epochs and shards have five digits, so that their order as text is their order."""
INDEX_LIMIT = 1_000_000
"""Sample indices have six digits, for the same reason."""
PARTITION_NAMES = frozenset({"run_id", "epoch", "reward_name", "pictures_name"})
"""Names of partition keys; no column of a table may share one (pyarrow refuses to merge them)."""
TENSORS_SUFFIX = ".safetensors"
"""Suffix of the checkpoint objects that retirement deletes; JSON documents stay."""

_ID_RULE = "a letter, then letters, digits, '.', '_' or '-'; 100 characters at most"
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")
_REWARD_ID = re.compile(r"(?=.{10,100}\Z)[A-Za-z][A-Za-z0-9._-]*-[0-9a-f]{8}")
_SEGMENT = re.compile(r"[A-Za-z0-9._=-]{1,200}")
_CHECKPOINT_OBJECT = re.compile(r"checkpoints/run_id=([^/]+)/epoch=(\d{5})/.+")
_CHECKPOINT_MANIFEST = re.compile(r"manifests/checkpoints/run_id=([^/]+)/epoch=(\d{5})\.json")

_RUN = re.compile(r"/run_id=([^/]+)/")
_EPOCH = re.compile(r"/epoch=(\d{5})(?:/|\.json$)")
_EPOCH_OBJECT = re.compile(
    r"(?P<tree>trajectories|rollouts|rewards|statistics)/(reward_name=[^/]+/)?"
    r"run_id=(?P<run_id>[^/]+)/epoch=(?P<epoch>\d{5})/.+"
)
_PART_MANIFEST = re.compile(
    r"manifests/(?P<kind>rollouts|rewards|advantages)/(reward_name=[^/]+/)?run_id=[^/]+/"
    r"epoch=(?P<epoch>\d{5})(/shard-(?P<shard>\d{5}))?\.json"
)


def check_key(key: str) -> str:
    """Checks that a key is safe as a path below the root.

    Args:
        key: A key from anywhere.

    Returns:
        The key.

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
    """Checks a run id.

    Args:
        run_id: A run id from anywhere.

    Returns:
        The run id.

    Raises:
        InvalidKey: It does not start with a letter (a number would be read as an int partition),
            or has a character outside [A-Za-z0-9._-], or more than 100 characters.
    """
    if not _ID.fullmatch(run_id):
        raise InvalidKey("run id", run_id, _ID_RULE)
    return run_id


def validate_reward_id(reward_id: str) -> str:
    """Checks a reward id.

    Args:
        reward_id: A reward id from anywhere.

    Returns:
        The reward id.

    Raises:
        InvalidKey: It is not 'NAME-<digest8>' of the characters that a run id may have.
    """
    if not _REWARD_ID.fullmatch(reward_id):
        raise InvalidKey(
            "reward id", reward_id, f"NAME-<8 hex digits of its digest>, as a whole {_ID_RULE}"
        )
    return reward_id


def sample_id(run_id: str, epoch: int, index: int) -> str:
    """Returns the id of a sample, 'R/00003/000017'; `index` counts within the epoch."""
    return f"{validate_run_id(run_id)}/{_epoch(epoch)}/{_index(index)}"


def image_name(index: int) -> str:
    """Returns the file name that a table gives a sample's picture, '000017.png'."""
    return f"{_index(index)}.png"


# Runs


def run_key(run_id: str) -> str:
    """Returns the key of a run's record."""
    return f"runs/{validate_run_id(run_id)}/run.json"


def start_key(run_id: str, number: int) -> str:
    """Returns the key of the record of a run's start, counted from 1."""
    return f"{starts_prefix(run_id)}/{_number(number, 'start number')}.json"


def starts_prefix(run_id: str) -> str:
    """Returns the folder of the records of a run's starts."""
    return f"runs/{validate_run_id(run_id)}/starts"


def fork_key(run_id: str, fork: str) -> str:
    """Returns the key of the record that another run branches off this one."""
    return f"{forks_prefix(run_id)}/{validate_run_id(fork)}.json"


def forks_prefix(run_id: str) -> str:
    """Returns the folder of the records of a run's forks."""
    return f"runs/{validate_run_id(run_id)}/forks"


# Stems of data objects: `Store.put` appends the digest and the suffix.


def rollout_stem(run_id: str, epoch: int, shard: int) -> str:
    """Returns the stem of a shard of the rollouts table."""
    return f"rollouts/{_partition(run_id, epoch)}/{_shard(shard)}"


def rollouts_prefix(run_id: str) -> str:
    """Returns the folder of a run's rollouts table."""
    return f"rollouts/run_id={validate_run_id(run_id)}"


def trajectories_prefix(run_id: str) -> str:
    """Returns the folder of a run's trajectories."""
    return f"trajectories/run_id={validate_run_id(run_id)}"


def trajectory_stem(run_id: str, epoch: int, shard: int) -> str:
    """Returns the stem of a shard of trajectories."""
    return f"trajectories/{_partition(run_id, epoch)}/{_shard(shard)}"


def reward_stem(reward_id: str, run_id: str, epoch: int, shard: int) -> str:
    """Returns the stem of a shard of the rewards table."""
    return f"rewards/{_reward(reward_id)}/{_partition(run_id, epoch)}/{_shard(shard)}"


def advantage_stem(reward_id: str, run_id: str, epoch: int) -> str:
    """Returns the stem of an epoch's advantages table."""
    return f"advantages/{_reward(reward_id)}/{_partition(run_id, epoch)}/part"


def statistics_stem(reward_id: str, run_id: str, epoch: int) -> str:
    """Returns the stem of the prompt statistics after an epoch's rewards.

    Not beside the advantages: whoever globs that folder expects Parquet files only.
    """
    return f"statistics/{_reward(reward_id)}/{_partition(run_id, epoch)}/part"


def pictures_stem(pictures_id: str, run_id: str, epoch: int) -> str:
    """Returns the stem of the pictures of fixed prompts and seeds that a checkpoint draws."""
    return f"pictures/{_pictures(pictures_id)}/{_partition(run_id, epoch)}/part"


def checkpoint_stem(run_id: str, epoch: int, name: str) -> str:
    """Returns the stem of a checkpoint's part, such as 'weights' or 'optimizer'."""
    return check_key(f"{checkpoints_prefix(run_id)}/epoch={_epoch(epoch)}/{name}")


def checkpoints_prefix(run_id: str) -> str:
    """Returns the folder of a run's checkpoint objects."""
    return f"checkpoints/run_id={validate_run_id(run_id)}"


# Manifests


def rollout_manifest_key(run_id: str, epoch: int, shard: int) -> str:
    """Returns the key of the manifest of a rollout shard (its table and its trajectories)."""
    return f"manifests/rollouts/{_partition(run_id, epoch)}/{_shard(shard)}.json"


def reward_manifest_key(reward_id: str, run_id: str, epoch: int, shard: int) -> str:
    """Returns the key of the manifest of a scored shard."""
    partition = f"{_reward(reward_id)}/{_partition(run_id, epoch)}"
    return f"manifests/rewards/{partition}/{_shard(shard)}.json"


def advantage_manifest_key(reward_id: str, run_id: str, epoch: int) -> str:
    """Returns the key of the manifest of an epoch's advantages."""
    return f"manifests/advantages/{_reward(reward_id)}/{_partition(run_id, epoch)}.json"


def statistics_manifest_key(reward_id: str, run_id: str, epoch: int) -> str:
    """Returns the key of the manifest of prompt statistics that were rebuilt, of no advantages."""
    return f"manifests/statistics/{_reward(reward_id)}/{_partition(run_id, epoch)}.json"


def pictures_manifest_key(pictures_id: str, run_id: str, epoch: int) -> str:
    """Returns the key of the manifest of a checkpoint's pictures of fixed prompts and seeds."""
    return f"manifests/pictures/{_pictures(pictures_id)}/{_partition(run_id, epoch)}.json"


def checkpoint_manifest_key(run_id: str, epoch: int) -> str:
    """Returns the key of the manifest of the state before an epoch."""
    return f"manifests/checkpoints/{_partition(run_id, epoch)}.json"


def epoch_manifest_key(run_id: str, epoch: int) -> str:
    """Returns the key of an epoch's commit."""
    return f"manifests/epochs/{_partition(run_id, epoch)}.json"


def epoch_manifests_prefix(run_id: str) -> str:
    """Returns the folder of the commits of a run's epochs."""
    return f"manifests/epochs/run_id={validate_run_id(run_id)}"


def retired_checkpoint_key(run_id: str, epoch: int) -> str:
    """Returns the key of the record that a checkpoint's objects were deleted on purpose."""
    return f"manifests/retired/checkpoints/{_partition(run_id, epoch)}.json"


def retired_epoch_key(part: str, run_id: str, epoch: int) -> str:
    """Returns the key of the record that an epoch's objects were deleted on purpose.

    Args:
        part: 'trajectories'; or 'samples': pictures, scores and statistics.
        run_id: The run.
        epoch: The epoch.
    """
    return check_key(f"manifests/retired/{part}/{_partition(run_id, epoch)}.json")


def retirement_of(key: str) -> str | None:
    """Returns the key of the record that would tell of an object's deletion, if one may be deleted.

    Args:
        key: Key of any object.

    Returns:
        None for objects that retention never deletes.
    """
    checkpoint = parse_checkpoint_object(key)
    if checkpoint is not None:
        return retired_checkpoint_key(*checkpoint) if key.endswith(TENSORS_SUFFIX) else None
    match = _EPOCH_OBJECT.fullmatch(key)
    if match is None:
        return None
    part = "trajectories" if match["tree"] == "trajectories" else "samples"
    return retired_epoch_key(part, match["run_id"], int(match["epoch"]))


def parse_epoch(key: str) -> int | None:
    """Returns the epoch that a key is of, None for keys of none."""
    match = _EPOCH.search(key)
    return int(match[1]) if match else None


def run_of(key: str) -> str | None:
    """Returns the run that a table, a checkpoint or a manifest is of, None for other keys."""
    match = _RUN.search(key)
    return match[1] if match else None


def parse_part_manifest(key: str) -> tuple[str, int, int | None] | None:
    """Reads what a manifest of an epoch's parts is about.

    Args:
        key: Key of any manifest.

    Returns:
        'rollouts', 'rewards' or 'advantages'; epoch; and shard, None of advantages. None for other
        manifests.
    """
    match = _PART_MANIFEST.fullmatch(key)
    if match is None:
        return None
    return match["kind"], int(match["epoch"]), int(match["shard"]) if match["shard"] else None


CHECKPOINT_MANIFESTS = "manifests/checkpoints"
"""Folder of the checkpoint manifests of all runs."""


def parse_checkpoint_object(key: str) -> tuple[str, int] | None:
    """Returns the run id and epoch of a checkpoint object's key, None for other keys."""
    match = _CHECKPOINT_OBJECT.fullmatch(key)
    return (match[1], int(match[2])) if match else None


def parse_checkpoint_manifest(key: str) -> tuple[str, int] | None:
    """Returns the run id and epoch of a checkpoint manifest's key, None for other keys."""
    match = _CHECKPOINT_MANIFEST.fullmatch(key)
    return (match[1], int(match[2])) if match else None


def _partition(run_id: str, epoch: int) -> str:
    return f"run_id={validate_run_id(run_id)}/epoch={_epoch(epoch)}"


def _reward(reward_id: str) -> str:
    return f"reward_name={validate_reward_id(reward_id)}"


def _pictures(pictures_id: str) -> str:
    return check_key(f"pictures_name={pictures_id}")


def _shard(shard: int) -> str:
    return f"shard-{_number(shard, 'shard')}"


def _epoch(epoch: int) -> str:
    return _number(epoch, "epoch")


def _number(value: int, what: str) -> str:
    if not 0 <= value < EPOCH_LIMIT:
        raise InvalidKey(what, value, f"0 to {EPOCH_LIMIT - 1}")
    return f"{value:05d}"


def _index(index: int) -> str:
    if not 0 <= index < INDEX_LIMIT:
        raise InvalidKey("sample index", index, f"0 to {INDEX_LIMIT - 1}")
    return f"{index:06d}"
