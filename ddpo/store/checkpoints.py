"""Checkpoints: the state before an epoch, committed whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ddpo.basics.digests import canonical_json
from ddpo.errors import MissingObject, RetiredObject
from ddpo.store import keys, manifests
from ddpo.store.manifests import Committed, Manifest, Ref
from ddpo.store.objects import Store
from ddpo.store.tensors import decode_tensors, encode_tensors
from ddpo.store.upkeep.retention import is_retired
from ddpo.training.state import TrainState

TENSOR_ROLES = ("weights", "optimizer", "ema", "value")
"""The roles of a checkpoint's objects that hold tensors; the last two only where there are any."""


def commit_checkpoint(
    store: Store,
    run_id: str,
    state: TrainState,
    *,
    inputs: Mapping[str, Any],
    documents: Mapping[str, Mapping[str, Any]],
) -> Committed:
    """Write a state and commit it as checkpoint ``state.epoch``.

    Args:
        store: The store.
        run_id: The run.
        state: The state before epoch ``state.epoch``.
        inputs: What it was made from.
        documents: What describes it, JSON values by role: digests, metrics.

    Returns:
        The commit, which is another writer's if one came first.

    Raises:
        ConflictingCommit: The checkpoint was committed from other inputs.
    """
    progress = {
        "epoch": state.epoch,
        "updates": state.updates,
        "samples": state.samples,
        "statistics": {prompt: list(rewards) for prompt, rewards in state.statistics.items()},
    }
    parts = {
        "weights": (".safetensors", encode_tensors(state.weights)),
        "optimizer": (".safetensors", encode_tensors(state.optimizer)),
        **{
            role: (".safetensors", encode_tensors(tensors))
            for role, tensors in (("ema", state.ema), ("value", state.value))
            if tensors
        },
        "progress": (".json", canonical_json(progress)),
        **{role: (".json", canonical_json(value)) for role, value in documents.items()},
    }
    objects = {
        role: store.put(keys.checkpoint_stem(run_id, state.epoch, role), suffix, data)
        for role, (suffix, data) in parts.items()
    }
    return manifests.commit(
        store,
        keys.checkpoint_manifest_key(run_id, state.epoch),
        kind="checkpoint",
        inputs=inputs,
        objects=objects,
    )


def find_checkpoint(store: Store, run_id: str, epoch: int) -> Committed | None:
    """Return checkpoint ``epoch`` of a run, None where it is not committed."""
    return manifests.find(store, keys.checkpoint_manifest_key(run_id, epoch))


def latest_checkpoint(store: Store, run_id: str, first: int = 0) -> tuple[int, Ref] | None:
    """Return the newest committed checkpoint's epoch and reference, None where there is none.

    Args:
        store: The store.
        run_id: The run.
        first: The epoch of its first checkpoint.
    """
    found = None
    epoch = first
    while (committed := find_checkpoint(store, run_id, epoch)) is not None:
        found = (epoch, committed.ref)
        epoch += 1
    return found


def load_checkpoint(store: Store, ref: Ref) -> TrainState:
    """Read a state back.

    Args:
        store: The store.
        ref: A checkpoint's manifest.

    Returns:
        The state, tensors on the CPU.

    Raises:
        RetiredObject: Retention deleted its weights.
        MissingObject: Something is not there.
        CorruptObject: Something is not what was committed.
    """
    manifest = manifests.load(store, ref)
    try:
        tensors = {
            role: decode_tensors(store.get(manifest.objects[role]))[0]
            for role in TENSOR_ROLES
            if role in manifest.objects
        }
        progress = load_document(store, manifest, "progress")
    except MissingObject as error:
        owner = keys.parse_checkpoint_manifest(ref.key)
        if owner is not None and is_retired(store, *owner):
            retired = keys.retired_checkpoint_key(*owner)
            raise RetiredObject(error.key, store.root, retired) from error
        raise
    return TrainState(
        weights=tensors["weights"],
        optimizer=tensors["optimizer"],
        statistics={prompt: tuple(r) for prompt, r in progress["statistics"].items()},
        epoch=progress["epoch"],
        updates=progress["updates"],
        samples=progress["samples"],
        ema=tensors.get("ema", {}),
        value=tensors.get("value", {}),
    )


def load_document(store: Store, manifest: Manifest, role: str) -> dict[str, Any]:
    """Read one of a manifest's JSON objects.

    Args:
        store: The store.
        manifest: Lists the object.
        role: Its role.

    Returns:
        The document.

    Raises:
        MissingObject: It is not there.
        CorruptObject: It is not what was committed.
    """
    return json.loads(store.get(manifest.objects[role]))
