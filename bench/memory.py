"""Memory that large objects take, beside the model: ``python -m bench.memory``.

``epoch`` samples and updates an epoch by the tasks of any run. Its trajectories are as large as
asked for; the starter sees a corner of each latent only, since memory does not depend on what is
computed. ``checkpoint`` commits a training state and loads it again.

What is measured is the process's anonymous memory (RssAnon), at its highest while the block runs:
pages that are mapped from files are not in it, since the kernel drops them where memory is short.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ddpo.config.files import read_config
from ddpo.models.stable_diffusion import StableDiffusion
from ddpo.runs import start_run
from ddpo.store.checkpoints import checkpoint_objects
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo.training.state import TrainState
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.update import update_policy

SHARD_SIZE = 4
RESOLUTION = 2048
LATENT_BYTES = 4 * 512 * 512 * 4
"""Of the starter at this resolution: few samples and steps make many gigabytes."""


class AnonymousMemory:
    """Measures by how much this process's anonymous memory exceeds what it was at first."""

    def __init__(self) -> None:
        self.grown_mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> AnonymousMemory:
        self._before_mb = _anonymous_mb()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.grown_mb = max(self.grown_mb, _anonymous_mb() - self._before_mb)


def _anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) / 1000


def shrink_compute() -> None:
    """Let the model see a corner of its latents, and draw small gray images."""
    predict = StableDiffusion.predict

    def of_corner(policy: StableDiffusion, latents: Tensor, *given: Any) -> Tensor:
        corner = predict(policy, latents[..., :8, :8], *given)
        return torch.zeros_like(latents) + corner.mean(dim=(2, 3), keepdim=True)

    def gray(_: StableDiffusion, latents: Tensor) -> list[Image.Image]:
        return [Image.new("RGB", (64, 64), "gray") for _ in latents]

    # By name: the types of what replaces a method differ in the names of its parameters.
    for name, replacement in {"predict": of_corner, "decode": gray}.items():
        setattr(StableDiffusion, name, replacement)


def measure_epoch(gigabytes: float, steps: int, root: str) -> None:
    """Print what sampling and update of an epoch take.

    Args:
        gigabytes: Size of its trajectories.
        steps: Denoising steps.
        root: The store.
    """
    shards = round(gigabytes * 1e9 / ((steps + 1) * LATENT_BYTES * SHARD_SIZE))
    settings = (
        f"model={{path: starter, resolution: {RESOLUTION}}}",
        f"rollouts={{samples_per_epoch: {shards * SHARD_SIZE}, shard_size: {SHARD_SIZE}}}",
        f"sampler={{steps: {steps}, window: null}}",
        "algorithm.updates_per_epoch=1",
        "numerics={device: cpu, sample_batch_size: 2, micro_batch_size: 2, threads: 1}",
    )
    run = start_run(read_config("configs/starter.yaml", settings, {"storage.root": root}), "memory")
    shrink_compute()
    handle, checkpoint = run.handle, start.fn(run.handle)
    with AnonymousMemory() as sampling:
        rollouts = [sample_shard.fn(handle, checkpoint, 0, shard) for shard in range(shards)]
    scores = [score_shard.fn(handle, ref, 0, shard) for shard, ref in enumerate(rollouts)]
    advantages = credit_of.fn(handle, checkpoint, rollouts, scores, 0)
    with AnonymousMemory() as update:
        update_policy.fn(handle, checkpoint, rollouts, advantages, 0)
    stored = sum(run.store.sizes("trajectories").values())
    print(
        f"{stored / 1e9:.2f} GB of trajectories in {shards} shards of "
        f"{stored / shards / 1e6:.0f} MB: sampling +{sampling.grown_mb:.0f} MB, update "
        f"+{update.grown_mb:.0f} MB"
    )


def measure_checkpoint(gigabytes: float, root: str) -> None:
    """Print what it takes to commit and to load a state: a third weights, the rest moments.

    Args:
        gigabytes: Its size.
        root: The store.
    """
    names = range(round(gigabytes * 1e9 / 3 / 16e6))

    def tensors(*prefixes: str) -> dict[str, Tensor]:
        return {f"{prefix}{name}": torch.randn(4_000_000) for prefix in prefixes for name in names}

    state = TrainState(tensors(""), tensors("exp_avg/", "exp_avg_sq/"), {}, 1, 1, 1)
    store, where = Store.open(root), Partition("memory", 1)
    with AnonymousMemory() as commit:
        ref = CHECKPOINT.commit(store, where, {}, checkpoint_objects(state, {})).ref
    with AnonymousMemory() as load:
        loaded = CHECKPOINT.load(store, ref).state()
        assert all(torch.equal(loaded.weights[name], state.weights[name]) for name in state.weights)
    size = sum(stored.size for stored in CHECKPOINT.require(store, where).objects.values())
    print(
        f"a checkpoint of {size / 1e9:.2f} GB in {store.root}: commit +{commit.grown_mb:.0f} MB, "
        f"load +{load.grown_mb:.0f} MB"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["epoch", "checkpoint"])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--root", help="the store; by default a temporary folder")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        root = given.root or f"{folder}/store"
        if given.what == "epoch":
            measure_epoch(given.gigabytes, given.steps, root)
        else:
            measure_checkpoint(given.gigabytes, root)


if __name__ == "__main__":
    main()
