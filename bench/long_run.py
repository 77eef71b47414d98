"""What the later epochs of a long run cost beside the early ones: ``python -m bench.long_run``.

Each epoch samples, scores and trains on two images of the starter in two steps, so that almost all
of it is Prefect, the store and MLflow. Seconds are CPU time of the flow's process, because machines
are shared; memory is what it holds after the epoch.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from prefect.settings import PREFECT_HOME

import ddpo_workflow.flows.train

_OVERRIDES = (
    "rollouts.samples_per_epoch=2",
    "rollouts.shard_size=2",
    "numerics.sample_batch_size=2",
    "numerics.micro_batch_size=2",
    "numerics.threads=1",
    "sampler.steps=2",
    "sampler.window=null",
    "algorithm.updates_per_epoch=1",
    "evaluation=null",
)


def main() -> None:
    """Print one line per stretch of epochs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    arguments = parser.parse_args()
    one_epoch = ddpo_workflow.flows.train.run_epoch
    me = psutil.Process()
    spent: list[float] = []

    def measured(*given: Any) -> Any:
        before = time.process_time()
        outcome = one_epoch(*given)
        spent.append(time.process_time() - before)
        if len(spent) % arguments.every == 0:
            gc.collect()
            recent = spent[-arguments.every :]
            database = (Path(str(PREFECT_HOME.value())) / "prefect.db").stat().st_size / 1e6
            print(
                f"epochs {len(spent) - arguments.every} to {len(spent) - 1}: "
                f"{sum(recent) / len(recent):.2f} s each, memory "
                f"{me.memory_info().rss / 1e6:.0f} MB, Prefect's database {database:.0f} MB",
                flush=True,
            )
        return outcome

    ddpo_workflow.flows.train.run_epoch = measured  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        ddpo_workflow.flows.train.train(
            "configs/starter.yaml",
            run_id="long",
            epochs=arguments.epochs,
            storage=f"{folder}/store",
            tracking=f"sqlite:///{folder}/mlflow.db",
            overrides=[f"outputs={folder}/outputs", *_OVERRIDES],
        )


if __name__ == "__main__":
    main()
