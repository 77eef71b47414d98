"""What the gate would have said of runs that are evaluated: ``python -m bench.gate RUN ...``."""

from __future__ import annotations

import argparse

from ddpo.analysis.evaluation.champion import best_of
from ddpo.config import GateConfig
from ddpo.runs import Run, open_run, storage_root
from ddpo.store.objects import Store
from ddpo_workflow.tasks.evaluated import (
    alarms_of,
    candidates,
    evaluated_epochs,
    labels_of,
    metrics_of,
)


def judge(run: Run) -> None:
    """Print each evaluated checkpoint of a run: scores, diversity, and the alarms at the defaults.

    Args:
        run: The run, whose config has an `evaluation`.
    """
    assert run.config.evaluation is not None
    config = run.config.evaluation.changed(gate=GateConfig())
    epochs = evaluated_epochs(run, config, "trained")
    first = metrics_of(run, config, epochs[0])
    print(f"{run.run_id}")
    for epoch in epochs:
        metrics = metrics_of(run, config, epoch)
        scores = ", ".join(
            f"{label} {metrics[f'{label}/mean']:.3f}"
            + (f" ({metrics[f'{label}/gain']:+.3f})" if f"{label}/gain" in metrics else "")
            for label in labels_of(run, config)
        )
        diversity = metrics["diversity"] / first["diversity"]
        alarms = "; ".join(alarms_of(run, config, epoch)) or "-"
        print(f"  {epoch:3d}  {scores}, diversity {diversity:.2f}: {alarms}")
    best = best_of(candidates(run, config))
    print(f"  champion: {'none' if best is None else best.epoch}")


def main() -> None:
    """Judge the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", help="The store; by default the one of `ddpo train`.")
    arguments = parser.parse_args()
    store = Store.open(storage_root(arguments.root))
    for name in arguments.runs:
        judge(open_run(store, name))


if __name__ == "__main__":
    main()
