"""The cost of evaluations at their defaults: ``python -m bench.evaluation_cost``.

Trains the starter's demo through the whole flow, and compares the seconds that
an evaluation takes (sampling, scoring, statistics) with those of an epoch.
"""

from __future__ import annotations

import argparse
import tempfile

import ddpo_workflow.flows.train
import ddpo_workflow.tasks.evaluate
from bench.overhead import Stopwatch

PARTS = ("sample", "kl_to_base", "scored_rows", "evaluation_rows", "summarize")


def main() -> None:
    """Run the epochs and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    evaluation, epoch = Stopwatch(), Stopwatch()
    module = ddpo_workflow.tasks.evaluate
    for name in PARTS:
        setattr(module, name, evaluation.around(getattr(module, name)))
    ddpo_workflow.flows.train.run_epoch = epoch.around(ddpo_workflow.flows.train.run_epoch)
    with tempfile.TemporaryDirectory() as folder:
        ddpo_workflow.flows.train.train(
            "configs/starter.yaml",
            run_id="cost",
            epochs=arguments.epochs,
            storage=f"{folder}/store",
            tracking=f"sqlite:///{folder}/mlflow.db",
            # Of the first checkpoint and of the last.
            overrides=[f"outputs={folder}/outputs", f"evaluation={{every: {arguments.epochs}}}"],
        )
    one, per_epoch = evaluation.seconds / 2, epoch.seconds / arguments.epochs
    print(
        f"an evaluation takes {one:.1f} s, an epoch {per_epoch:.1f} s: "
        f"{one / (one + 5 * per_epoch):.1%} of a run that evaluates every fifth epoch"
    )


if __name__ == "__main__":
    main()
