"""What `rollouts.sample_ahead` saves with a slow reward: ``python -m bench.slow_reward``.

Trains by configs/starter.yaml with a reward that hardly computes and answers late, as one on
another machine does: an epoch's scores take as long as its sampling, or a multiple of that. Each
run is made with samples of the newest weights, and with samples that are drawn ahead.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mlflow.tracking import MlflowClient
from PIL import Image

from bench.report import machine, table, write_record
from bench.results import train_run
from ddpo.basics.images import encode_image
from ddpo.config.files import read_config
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_numerics
from ddpo_workflow.flows.cli.quiet import hide_loading_bars

CONFIG = "configs/starter.yaml"
SECONDS = "BENCH_SECONDS_AN_IMAGE"


def late(images: Sequence[Image.Image], prompts: Sequence[Any]) -> list[float]:
    """Return the images' sizes as PNG, negative, after a while that uses no CPU."""
    time.sleep(float(os.environ[SECONDS]) * len(images))
    return [-len(encode_image(image)) / 1000 for image in images]


def seconds_of_sampling(settings: Mapping[str, object]) -> float:
    """Return the seconds that one image takes, after one shard that is not counted."""
    config = read_config(CONFIG, [f"{name}={value}" for name, value in settings.items()])
    policy = load_policy(config.model, config.trainable, resolve_numerics(config.numerics), seed=0)
    sampler, count = sampler_of_epoch(policy, config, 0), config.rollouts.shard_size
    took = 0.0
    for _ in range(2):
        began = time.perf_counter()
        sample(policy, ["a cat"] * count, list(range(count)), sampler)
        took = time.perf_counter() - began
    return took / count


def epochs_of(run_id: str, settings: Mapping[str, object], folder: Path) -> list[float]:
    """Train a run by the command, and return the seconds of its epochs."""
    train_run(run_id, CONFIG, settings, folder)
    client = MlflowClient(f"sqlite:///{folder}/mlflow-{run_id}.db")
    (page,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return [each.value for each in client.get_metric_history(page.info.run_id, "time/epoch_s")]


def main() -> None:
    """Measure both ways for each reward, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slower", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=256, help="of an epoch, in four shards")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    hide_loading_bars()
    settings = {
        "epochs": given.epochs,
        "rollouts.samples_per_epoch": given.samples,
        "rollouts.shard_size": given.samples // 4,
        "numerics.sample_batch_size": given.samples // 4,
        "numerics.micro_batch_size": given.samples // 4,
        "numerics.threads": 1,
        "reward": f"{{name: 'bench.slow_reward:{late.__name__}'}}",
    }
    an_image = seconds_of_sampling(settings)
    seconds: dict[str, list[float]] = {}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name:
        for slower in given.slower:
            os.environ[SECONDS] = str(an_image * slower)
            in_time, ahead = (
                epochs_of(
                    f"slower-{slower:g}-{word}",
                    {**settings, "rollouts.sample_ahead": word},
                    Path(name),
                )
                for word in ("false", "true")
            )
            seconds |= {f"{slower:g}": in_time, f"{slower:g} ahead": ahead}
            # The first epoch starts all, and samples two epochs where the last one samples none.
            each = [median(found[1:-1]) for found in (in_time, ahead)]
            rows.append([f"{slower:g}", *(f"{s:.1f} s" for s in each), f"{each[1] / each[0]:.2f}"])
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{given.samples} samples, {an_image:.3f} s of sampling each; median of an epoch\n")
    headings = ["seconds of scoring to those of sampling", "newest weights", "ahead", "ratio"]
    print(table(headings, rows))
    write_record(given.json, "slow_reward", {"samples": given.samples}, seconds=seconds)


if __name__ == "__main__":
    main()
