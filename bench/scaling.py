"""What more workers and more shards cost: ``python -m bench.scaling``.

An epoch's shards are submitted, committed and scored through Prefect, the engine and a store on the
local disk, as in any run; only the model is replaced, by a sampler that sleeps. So workers on a
machine with few cores behave like GPUs that compute. Wall times depend on what else the cores do;
CPU times hardly do.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_HOME

import ddpo_workflow.tasks.sample
from ddpo.basics.images import encode_image
from ddpo.config.files import read_config
from ddpo.runs import Run, RunHandle, start_run
from ddpo.store import keys
from ddpo.store.artefacts import RolloutShard
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.manifests import Ref
from ddpo.store.tables import RolloutRow, encode_rollouts, encode_samples
from ddpo_workflow.flows.epoch import submit_shards
from ddpo_workflow.flows.flow import ddpo_flow, without_heartbeats
from ddpo_workflow.tasks.engines import open_engine, ray_actors
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.worker import opened


def sleeping_shard(
    handle: RunHandle, checkpoint: Ref[Checkpoint], epoch: int, shard: int, seconds: float
) -> Ref[RolloutShard]:
    """Commit a shard whose images take some time; runs in a worker.

    Args:
        handle: The run.
        checkpoint: The checkpoint before the epoch.
        epoch: The epoch.
        shard: The shard.
        seconds: How long to sleep.
    """
    ddpo_workflow.tasks.sample._sampled = lambda *_: _slept(opened(handle), epoch, shard, seconds)
    return ddpo_workflow.tasks.sample.shard_of(opened(handle), checkpoint, epoch, shard)


def _ready() -> None:
    """Import what a shard needs; take long enough that each worker gets one of these calls."""
    importlib.import_module("ddpo_workflow.tasks.sample")
    time.sleep(1.0)


def _slept(run: Run, epoch: int, shard: int, seconds: float) -> dict[str, bytes]:
    time.sleep(seconds)
    size = run.config.rollouts.shard_size
    image = encode_image(Image.fromarray(np.zeros((64, 64, 3), np.uint8)))
    rows = [
        RolloutRow(
            sample_id=keys.sample_id(run.run_id, epoch, index),
            shard=shard,
            index=index,
            prompt="a cat",
            prompt_metadata={},
            seed=index,
            policy_digest="0" * 64,
            sampler_digest="0" * 64,
            log_prob_mean=0.0,
            image_png=image,
        )
        for index in range(shard * size, (shard + 1) * size)
    ]
    return {"rollouts": encode_rollouts(rows), "samples": encode_samples(rows), "trajectories": b""}


@ddpo_flow(name="ddpo-scaling", run_name="scaling")
def draw_epoch(run: RunHandle, checkpoint: Ref[Checkpoint], epoch: int) -> None:
    """Draw and score an epoch's shards.

    Args:
        run: The run.
        checkpoint: The checkpoint before the epoch.
        epoch: The epoch.
    """
    sampling, scoring = submit_shards(run, checkpoint, epoch)
    for future in (*sampling, *scoring):
        future.result()


class SharedActor(ray_actors.RayWorker):
    """A worker that is a thread of an actor's process, which several of them share.

    Such a process takes half a gigabyte, and hardly any time of a CPU while its samplers sleep.

    Args:
        number: From 0.
        gpus: How many GPUs it uses.
        trusted: Digests of the settings that this process trusts.
    """

    threads = 1
    """Number of workers per process."""

    def __init__(self, number: int, gpus: int, trusted: tuple[str, ...]) -> None:
        super().__init__(number, gpus, trusted)
        self._process = f"workers {number // self.threads}"

    def _start(self) -> Any:
        shared = ray_actors._ray().remote(num_cpus=self.threads, max_concurrency=self.threads)
        options = {"name": self._process, "get_if_exists": True}
        return shared(ray_actors._Actor).options(**options).remote(self._trusted)


def start_cluster(cpus: int) -> None:
    """Start a Ray cluster of this machine, which later runs of this process join.

    Args:
        cpus: How many CPUs it claims to have.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _system_config={"prestart_worker_first_driver": False},  # would start a process per CPU
    )


def cpu_seconds() -> dict[str, float]:
    """Return the CPU time so far: of this process, of Prefect's server, and of the workers.

    The last two are those that this process has started; Ray's own processes count as workers.
    """
    spent = {"flow": time.process_time(), "server": 0.0, "workers": 0.0}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            used, command = child.cpu_times(), " ".join(child.cmdline())
            where = "server" if "prefect.server" in command else "workers"
            spent[where] += used.user + used.system
    return spent


def measure(engine: dict[str, Any] | str, shards: int, seconds: float, folder: Path) -> None:
    """Print what an epoch costs.

    Args:
        engine: The engine.
        shards: Number of shards of the epoch.
        seconds: How long a shard takes on a worker.
        folder: Gets the store.
    """
    config = read_config(
        "configs/starter.yaml",
        [
            f"rollouts.samples_per_epoch={2 * shards}",
            "rollouts.shard_size=2",
            "numerics.sample_batch_size=2",
            "algorithm.updates_per_epoch=1",
            "epochs=2",
        ],
        {"storage.root": str(folder / "store"), "outputs": str(folder)},
    ).changed(engine=engine)
    run = start_run(config, f"shards-{shards}-{len(list(folder.iterdir()))}")
    checkpoint = start.fn(run.handle)
    ddpo_workflow.tasks.sample._shard_of = partial(sleeping_shard, seconds=seconds)
    me = psutil.Process()
    with open_engine(run) as workers, ThreadPoolExecutor(workers.workers) as threads:
        list(threads.map(lambda _: workers.call(_ready), range(workers.workers)))
        before, spent, began = me.memory_info().rss, cpu_seconds(), time.perf_counter()
        draw_epoch(run.handle, checkpoint, 0)
        passed = time.perf_counter() - began
        cost = {who: 1000 * (now - spent[who]) / shards for who, now in cpu_seconds().items()}
    grown = (me.memory_info().rss - before) / 1e6
    database = (Path(str(PREFECT_HOME.value())) / "prefect.db").stat().st_size / 1e6
    where = f"{workers.workers} x {config.engine.type}"
    busy = shards * seconds / (workers.workers * passed)
    print(
        f"{shards:5d} shards of {seconds:g} s, {where}: {passed:7.1f} s, "
        f"{shards / passed:5.2f} shards a second, workers busy {busy:.0%}; CPU ms a shard: "
        f"{', '.join(f'{who} {spent:.0f}' for who, spent in cost.items())}; "
        f"memory of the flow +{grown:.0f} MB, Prefect's database {database:.0f} MB",
        flush=True,
    )


def main() -> None:
    """Print one line per epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="processes", choices=["local", "processes", "ray"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--shards", type=int, nargs="+", default=[32])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument(
        "--address", help="a Ray cluster, whose nodes find this TMPDIR; by default, one is started"
    )
    parser.add_argument("--cpus", type=int, help="CPUs that a Ray cluster started here claims")
    parser.add_argument("--threads", type=int, default=1, help="workers per process on Ray")
    arguments = parser.parse_args()
    SharedActor.threads = arguments.threads
    ray_actors.RayWorker = SharedActor
    if arguments.cpus:
        start_cluster(arguments.cpus)
    with tempfile.TemporaryDirectory() as folder, without_heartbeats():
        get_client(sync_client=True)  # starts Prefect's temporary server
        for shards in arguments.shards:
            for workers in arguments.workers:
                engine: dict[str, Any] | str = {"type": arguments.engine, "workers": workers}
                if arguments.engine == "ray":
                    engine = {"type": "ray", "workers": workers, "address": arguments.address}
                elif arguments.engine == "local":
                    engine = "local"
                measure(engine, shards, arguments.seconds, Path(folder))


if __name__ == "__main__":
    main()
