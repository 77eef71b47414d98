"""The share of an epoch that is not model compute: ``python -m bench.overhead``.

Runs epochs of 256 samples of 20 steps on the starter, through the whole flow: Prefect's temporary
server, a store on the local disk, MLflow on SQLite. Model compute is the time inside the library's
sampling and update; all else (Prefect, storage, scoring that was waited for, tracking) is overhead.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ddpo_workflow.flows.train
import ddpo_workflow.tasks.pictures
import ddpo_workflow.tasks.sample
import ddpo_workflow.tasks.update
from bench.report import write_record


class Stopwatch:
    """Adds up the seconds that are spent inside wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    """Run the epochs and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, epoch = Stopwatch(), Stopwatch()
    ddpo_workflow.tasks.sample.sample = model.around(ddpo_workflow.tasks.sample.sample)
    ddpo_workflow.tasks.pictures.sample = model.around(ddpo_workflow.tasks.pictures.sample)
    ddpo_workflow.tasks.update.update = model.around(ddpo_workflow.tasks.update.update)
    one_epoch = ddpo_workflow.flows.train.run_epoch
    shares: list[float] = []
    epochs: list[dict[str, float]] = []

    def measured(*given: Any) -> Any:
        computed, passed = model.seconds, epoch.seconds
        outcome = epoch.around(one_epoch)(*given)
        computed, passed = model.seconds - computed, epoch.seconds - passed
        shares.append(1 - computed / passed)
        epochs.append({"epoch": passed, "model": computed})
        print(
            f"epoch {given[2]}: {passed:.1f} s, of which {computed:.1f} s model compute; "
            f"the rest is {shares[-1]:.1%}",
            flush=True,
        )
        return outcome

    ddpo_workflow.flows.train.run_epoch = measured  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        ddpo_workflow.flows.train.train(
            "configs/starter.yaml",
            run_id="overhead",
            epochs=arguments.epochs,
            storage=f"{folder}/store",
            tracking=f"sqlite:///{folder}/mlflow.db",
            overrides=[
                f"outputs={folder}/outputs",
                f"rollouts.samples_per_epoch={arguments.samples}",
                f"sampler.steps={arguments.steps}",
                "sampler.window=null",
            ],
        )
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"mean: {sum(shares) / len(shares):.1%} is not model compute; peak memory {peak_gb:.2f} GB"
    )
    settings = {"samples": arguments.samples, "steps": arguments.steps}
    write_record(arguments.json, "overhead", settings, seconds=epochs, peak_gb=peak_gb)


if __name__ == "__main__":
    main()
