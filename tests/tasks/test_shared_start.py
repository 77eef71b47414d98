"""`rollouts.shared_start`: the samples of a group start from the same noise, and part after it."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ddpo.errors import ConfigError
from ddpo.runs import RunHandle, start_run
from ddpo.store import manifests
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.start import start
from tests.tiny import tiny_config


def latents_of(model: Path, **rollouts: Any) -> torch.Tensor:
    """Return an epoch's latents, [8, 5, C, h, w], of two shards of 4."""
    root = f"memory://{uuid.uuid4().hex}"
    config = tiny_config(model, storage={"root": root}, rollouts=rollouts)
    run, handle = start_run(config, "r"), RunHandle(root=root, run_id="r")
    checkpoint = start.fn(handle)
    shards = [sample_shard.fn(handle, checkpoint, 0, shard) for shard in (0, 1)]
    objects = [manifests.load(run.store, shard).objects["trajectories"] for shard in shards]
    return torch.cat([load(run.store.get(stored))["latents"] for stored in objects])


@pytest.mark.parametrize("size", [2, 8])
def test_samples_of_a_group_start_alike_and_end_apart(tiny_model: Path, size: int) -> None:
    """A group may span two shards."""
    latents = latents_of(tiny_model, samples_per_prompt=size, shared_start=True)
    starts = latents[:, 0].reshape(8 // size, size, -1)
    assert torch.equal(starts, starts[:, :1].expand_as(starts))
    assert len({tuple(group[0].tolist()) for group in starts}) == 8 // size
    for step in range(1, latents.shape[1]):
        assert len({tuple(row.flatten().tolist()) for row in latents[:, step]}) == 8, step


def test_without_it_all_start_apart(tiny_model: Path) -> None:
    latents = latents_of(tiny_model, samples_per_prompt=2)
    assert len({tuple(row.flatten().tolist()) for row in latents[:, 0]}) == 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollouts": {"shared_start": True}}, "samples_per_prompt is 1"),
        (
            {
                "rollouts": {"shared_start": True, "samples_per_prompt": 2},
                "sampler": {"eta": 0.0},
                "algorithm": {"type": "nft", "updates_per_epoch": 2},
            },
            "the same image",
        ),
    ],
    ids=["no groups", "no noise"],
)
def test_where_it_would_do_nothing_or_make_copies_it_is_refused(
    tiny_model: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny_config(tiny_model, **changes)
