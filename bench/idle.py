"""How much of an epoch several workers compute: ``python -m bench.idle``.

Trains configs/starter.yaml with processes of one thread each, which sample shards and then share
the updates. What a worker does not compute, it waits: for the others, for scores, for the flow. The
first epoch, in which workers start, does not count. Needs as many idle cores as there are workers,
and better one more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import ddpo_workflow.flows.train
from bench.report import write_record
from bench.scaling import cpu_seconds
from ddpo_workflow.flows.cli.quiet import hide_loading_bars


def main() -> None:
    """Run the epochs, and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    hide_loading_bars()
    one_epoch = ddpo_workflow.flows.train.run_epoch
    shares: list[float] = []

    def measured(*parts: Any) -> Any:
        spent, began = cpu_seconds()["workers"], time.perf_counter()
        outcome = one_epoch(*parts)
        passed = time.perf_counter() - began
        share = (cpu_seconds()["workers"] - spent) / passed / given.workers
        if parts[2] > 0:
            shares.append(share)
            print(f"epoch {parts[2]}: {passed:.1f} s, {share:.0%} of them computed", flush=True)
        return outcome

    ddpo_workflow.flows.train.run_epoch = measured  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        ddpo_workflow.flows.train.train(
            "configs/starter.yaml",
            run_id="idle",
            epochs=given.epochs,
            storage=f"{folder}/store",
            tracking=f"sqlite:///{folder}/mlflow.db",
            overrides=[
                f"outputs={folder}/outputs",
                f"rollouts.shard_size={256 // given.shards}",
                f"numerics.sample_batch_size={min(64, 256 // given.shards)}",
                "numerics.threads=1",
                "tracking.system_metrics=false",
                f"engine={{type: processes, workers: {given.workers}}}",
            ],
        )
    print(f"mean: workers compute {sum(shares) / len(shares):.1%} of an epoch")
    settings = {"workers": given.workers, "shards": given.shards}
    write_record(given.json, "idle", settings, shares=shares)


if __name__ == "__main__":
    main()
