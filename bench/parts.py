"""What the parts around the model cost: ``python -m bench.parts``.

The store, against a bare write and read of the same bytes on the same disk; a task run of Prefect;
and what an epoch waits for its page in MLflow, on SQLite.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client

import ddpo_workflow.flows.epoch
import ddpo_workflow.flows.train
from bench.report import Seconds, Spread, machine, seconds_cell, table, timed, write_json
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from ddpo.store.objects import Store
from ddpo.store.tensors import write_tensors
from ddpo_workflow.flows.cli.quiet import hide_loading_bars
from ddpo_workflow.flows.flow import ddpo_flow, without_heartbeats

LEAST = 0.7
"""The share of a bare write's and read's speed that the store should reach."""
TASKS = 50
EPOCHS = 6

Figures = dict[str, list[Seconds]]


class Shard:
    """A shard of Stable Diffusion's trajectories on a disk.

    Args:
        folder: On the disk that is measured.
        samples: How many; one takes 3.3 MB.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.store = folder, Store.open(str(folder / "store"))
        draw = torch.Generator().manual_seed(0)
        self.tensors = {
            "latents": torch.randn(samples, 51, 4, 64, 64, generator=draw),
            "log_probs": torch.randn(samples, 50, generator=draw),
        }
        file = folder / "shard"
        file.touch()
        write_tensors(self.tensors, file)
        self.data = file.read_bytes()
        file.unlink()

    def stored(self, number: int) -> tuple[Seconds, Seconds]:
        """Commit the shard with its digest and manifest, and read it as an update does.

        Args:
            number: Another one each time.

        Returns:
            What the commit and the reading took.
        """
        self.tensors["log_probs"][0, 0] = number  # what is stored already is not written again
        objects = {"trajectories": partial(write_tensors, self.tensors)}
        where = Partition("shards", number, 0)
        wrote = timed(lambda: ROLLOUTS.commit(self.store, where, {}, objects))
        found = ROLLOUTS.commit_of(self.store, where)
        assert found is not None
        _forget(self.folder)

        def read() -> None:
            shard = ROLLOUTS.load(self.store, found.ref)
            shard.trajectories()["latents"].flatten()[::1024].sum()  # from every page

        took = timed(read)
        self.store.delete(found.manifest.objects["trajectories"].key)
        return wrote, took

    def bare(self, number: int) -> tuple[Seconds, Seconds]:
        """Write the same bytes, wait until they are on the disk, and read them from it."""
        path = self.folder / f"bare-{number}"

        def write() -> None:
            with path.open("wb") as file:
                file.write(self.data)
                file.flush()
                os.fsync(file.fileno())

        wrote = timed(write)
        _forget(self.folder)
        took = timed(path.read_bytes)
        path.unlink()
        return wrote, took


def _forget(folder: Path) -> None:
    """Let the kernel drop what it keeps of the files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def measure_store(folder: Path, samples: int, rounds: int) -> tuple[Figures, float]:
    """Write and read a shard in turn, by the store and without it.

    Args:
        folder: On the disk that is measured.
        samples: Of the shard.
        rounds: How often, after one round that is not counted.

    Returns:
        What each round took, and the shard's MB.
    """
    shard = Shard(folder, samples)
    took: Figures = {name: [] for name in ("commit", "load", "write", "read")}
    for number in range(rounds + 1):
        ways = [(("commit", "load"), shard.stored), (("write", "read"), shard.bare)]
        for names, way in ways if number % 2 else reversed(ways):
            for name, seconds in zip(names, way(number), strict=True):
                if number:
                    took[name].append(seconds)
    return took, len(shard.data) / 1e6


@task(cache_policy=NO_CACHE)
def _nothing() -> None: ...


@ddpo_flow(name="ddpo-parts", run_name="parts")
def _tasks() -> None:
    for _ in range(TASKS):
        _nothing()


def measure_tasks(rounds: int) -> list[Seconds]:
    """Return what a task run takes that does nothing, the server's own CPU time not included."""
    get_client(sync_client=True)  # starts Prefect's temporary server
    took = [timed(_tasks) for _ in range(rounds + 1)][1:]
    return [Seconds(each.cpu / TASKS, each.wall / TASKS) for each in took]


def measure_tracking(folder: Path) -> list[Seconds]:
    """Return what the epochs of a small run wait for its page in MLflow."""
    took: list[Seconds] = []
    track: Callable[..., Any] = ddpo_workflow.flows.epoch.track_epoch

    def measured(*given: Any, **named: Any) -> Any:
        outcome: list[Any] = []
        took.append(timed(lambda: outcome.append(track(*given, **named))))
        return outcome[0]

    ddpo_workflow.flows.epoch.track_epoch = measured  # pyright: ignore[reportAttributeAccessIssue]
    try:
        ddpo_workflow.flows.train.train(
            "configs/starter.yaml",
            run_id="parts",
            epochs=EPOCHS,
            storage=f"{folder}/store",
            tracking=f"sqlite:///{folder}/mlflow.db",
            overrides=[
                f"outputs={folder}/outputs",
                "rollouts={samples_per_epoch: 8, shard_size: 8}",
                "sampler={steps: 2, guidance_scale: 3.0}",
                "numerics.sample_batch_size=8",
                "numerics.micro_batch_size=8",
            ],
        )
    finally:
        ddpo_workflow.flows.epoch.track_epoch = track  # pyright: ignore[reportAttributeAccessIssue]
    return took[1:]  # the first makes the database's tables


def store_rows(took: Figures, megabytes: float) -> list[list[str]]:
    """Return the store's table: MB/s of both ways by wall time, and the share that it reaches."""
    rows = []
    for name, ours, bare in (("write", "commit", "write"), ("read", "load", "read")):
        speeds = [megabytes / median([each.wall for each in took[way]]) for way in (ours, bare)]
        shares = [b.wall / o.wall for o, b in zip(took[ours], took[bare], strict=True)]
        rows.append([name, *(f"{speed:.0f} MB/s" for speed in speeds), str(Spread.of(shares))])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        arguments: Of the command line, by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32, help="of the shard; 3.3 MB each")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    hide_loading_bars()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    with tempfile.TemporaryDirectory() as name, without_heartbeats():
        took, megabytes = measure_store(Path(name), given.samples, given.rounds)
        print(
            f"a shard of {megabytes:.0f} MB, {given.rounds} rounds; the share, with the smallest "
            f"and largest, should be at least {LEAST}\n"
        )
        print(table(["", "store", "bare", "share"], store_rows(took, megabytes)), flush=True)
        own: Figures = {
            "a task run of Prefect": measure_tasks(given.rounds),
            "an epoch's page in MLflow": measure_tracking(Path(name)),
        }
    print("\nMedians, CPU time of this process (wall time):\n")
    print(table(["", "takes"], [[name, seconds_cell(rounds)] for name, rounds in own.items()]))
    write_json(given.json, "parts", took | own, megabytes=megabytes)


if __name__ == "__main__":
    main()
