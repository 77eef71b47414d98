"""What rescoring costs compared with a bare loop: ``python -m bench.rescoring``.

Saves 1,024 images of 512 px as an epoch of 16 shards, then scores them twice with the same JPEG
reward, in turn: by the flow (tasks, digests, tables, advantages, MLflow; Prefect's server already
runs), and by a loop that reads the same Parquet files with pyarrow and scores. ``--starter`` uses
images of 64 px instead, as the starter's.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image
from prefect import flow

from ddpo.basics.images import encode_image
from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.builtin.jpeg import jpeg_kb
from ddpo.runs import Run, start_run
from ddpo.store import keys, manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH, ROLLOUTS
from ddpo.store.tables import RolloutRow, encode_rollouts, encode_samples
from ddpo_workflow.flows.cli.quiet import hide_loading_bars, set_defaults
from ddpo_workflow.flows.flow import without_heartbeats
from ddpo_workflow.flows.rescore import rescore
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.connection import connect

SHARDS, SHARD_SIZE = 16, 64


def jpeg(images: Sequence[Image.Image], prompts: Sequence[Prompt], take: int = 0) -> list[float]:
    """The JPEG reward; ``take`` makes it another each time, so that nothing is done already."""
    return [jpeg_kb(image) for image in images]


REWARD = "bench.rescoring:jpeg"


def save_epoch(config: RunConfig, side: int) -> Run:
    """Commit an epoch of images: soft colors with some noise, as large as a photograph's PNG.

    Args:
        config: A run's config with as many samples; its model generates none of them.
        side: Pixels per side.

    Returns:
        The run.
    """
    run = start_run(config, "saved")
    checkpoint = start.fn(run.handle)
    digests = CHECKPOINT.load(run.store, checkpoint).digests
    draw = np.random.default_rng(0)
    shards = []
    for shard in range(SHARDS):
        rows = []
        for index in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE):
            soft = Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).resize((side, side))
            noisy = np.asarray(soft) + draw.normal(0, 3, (side, side, 3))
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            rows.append(
                RolloutRow(
                    sample_id=keys.sample_id(run.run_id, 0, index),
                    shard=shard,
                    index=index,
                    prompt=run.prompts[index % len(run.prompts)].text,
                    prompt_metadata={},
                    seed=index,
                    policy_digest=digests["policy_digest"],
                    sampler_digest=digests["sampler_digest"],
                    log_prob_mean=None,
                    image_png=encode_image(picture),
                )
            )
        objects = {"rollouts": encode_rollouts(rows), "samples": encode_samples(rows)}
        done = ROLLOUTS.commit(
            run.store, Partition(run.run_id, 0, shard), {"shard": shard}, objects
        )
        shards.append(done.ref)
    inputs = {"rollouts": [ref.model_dump() for ref in shards], "rewards": []}
    key = EPOCH.key(Partition(run.run_id, 0))
    manifests.commit(run.store, key, kind="epoch", inputs=inputs, objects={})
    return run


def bare_loop(run: Run) -> list[float]:
    """Read the epoch's Parquet files one after the other, and score; nothing is kept."""
    reward = load_reward(REWARD, {})
    values: list[float] = []
    for shard in range(SHARDS):
        found = ROLLOUTS.commit_of(run.store, Partition(run.run_id, 0, shard))
        assert found is not None
        path = Path(run.store.root.removeprefix("file://")) / found.manifest.objects["rollouts"].key
        table = pq.ParquetFile(path).read(columns=["prompt", "image"])
        images = [Image.open(io.BytesIO(i["bytes"])) for i in table["image"].to_pylist()]
        prompts = [Prompt(text) for text in table["prompt"].to_pylist()]
        values += score_images(reward, images, prompts).values.tolist()
    return values


@flow
def wake() -> None:
    """Do nothing: Prefect's server is up afterwards."""


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a piece of work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starter", action="store_true", help="64 px instead of 512")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    set_defaults()
    hide_loading_bars()
    side = 64 if arguments.starter else 512
    ratios = []
    with tempfile.TemporaryDirectory() as folder, without_heartbeats():
        config = read_config(
            "configs/starter.yaml",
            [
                f"rollouts.samples_per_epoch={SHARDS * SHARD_SIZE}",
                f"rollouts.shard_size={SHARD_SIZE}",
                f"storage.root={folder}/store",
                f"tracking.uri=sqlite:///{folder}/mlflow.db",
                f"outputs={folder}/outputs",
            ],
        )
        run = save_epoch(config, side)
        shard_mb = run.store.size(_first(run).objects["rollouts"].key) / 1e6
        wake()
        connect(run.config.tracking.uri).search_experiments()  # which makes the database, once
        bare_loop(run)  # what is imported and read ahead once is not counted
        before = psutil.Process().memory_info().rss
        for number in range(arguments.rounds):
            bare = timed(lambda: bare_loop(run))
            flow_s = timed(
                lambda n=number: rescore(
                    "saved",
                    REWARD,
                    {"take": n},
                    storage=f"{folder}/store",
                    tracking=f"sqlite:///{folder}/mlflow.db",
                )
            )
            ratios.append(flow_s / bare)
            print(
                f"{SHARDS * SHARD_SIZE} images of {side} px: loop {bare:.1f} s, flow "
                f"{flow_s:.1f} s, ratio {ratios[-1]:.2f}; "
                f"{(flow_s - bare) / SHARDS * 1000:.0f} ms more per shard",
                flush=True,
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"median ratio {sorted(ratios)[len(ratios) // 2]:.2f}; peak memory "
        f"{(peak - before) / 1e6:.0f} MB above the start, a shard is {shard_mb:.0f} MB"
    )


def _first(run: Run) -> manifests.Manifest:
    found = ROLLOUTS.commit_of(run.store, Partition(run.run_id, 0, 0))
    assert found is not None
    return found.manifest


if __name__ == "__main__":
    main()
