"""What training achieves: ``python -m bench.results``.

Trains three seeds for JPEG compressibility and incompressibility, each beside a control whose
advantages are dealt to random samples; compares every trained model with its base on 45 animals x 4
fixed seeds. Runs that are finished are not run again, so the command may be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.evaluate import Evaluation, Gain, evaluate
from ddpo.digests import sha256_bytes
from ddpo.run import open_run
from ddpo.starter import JUDGE_PATH, STARTER_PATH
from ddpo.store.objects import Store
from flows.quiet import hide_loading_bars

CONFIGS = {
    "compressibility": "configs/starter.yaml",
    "incompressibility": "configs/starter_incompressibility.yaml",
}
TRAINING_SEEDS = (0, 1, 2)
EPOCHS = 12
"""As many as the demo's."""


@dataclass(frozen=True)
class Trial:
    """One training run of the comparison."""

    task: str
    seed: int
    control: bool

    @property
    def run_id(self) -> str:
        """The run's name."""
        return f"{self.task}-{'shuffled' if self.control else 'real'}-seed{self.seed}"


def train(trial: Trial, folder: Path, threads: int) -> None:
    """Train one trial by the project's own command, in a process of its own.

    Args:
        trial: Which.
        folder: Holds the store and MLflow's database of all trials.
        threads: CPU threads of torch.
    """
    settings = {
        "seed": trial.seed,
        "epochs": EPOCHS,
        "advantages.shuffle": str(trial.control).lower(),
        "numerics.threads": threads,
        "tracking.uri": f"sqlite:///{folder}/mlflow-{trial.run_id}.db",
        "tracking.system_metrics": "false",
        "tracking.pictures.seeds": "[0]",
        "outputs": folder / "outputs",
    }
    command = [sys.executable, "-m", "flows.cli", "train", CONFIGS[trial.task]]
    command += ["--run-id", trial.run_id, "--root", str(folder / "store")]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    log = folder / "logs" / f"{trial.run_id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # A Prefect home of its own: runs side by side would wait for one database.
    home = folder / "prefect" / trial.run_id
    home.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PREFECT_HOME": str(home)}
    with log.open("w") as stream:
        done = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{trial.run_id} failed; see {log}")
    print(f"  trained {trial.run_id}", flush=True)


def train_and_measure(trial: Trial, folder: Path, threads: int) -> None:
    """Train a trial and evaluate it, unless that is done already."""
    train(trial, folder, threads)
    measure(trial, folder, folder / "evaluations")


def measure(trial: Trial, folder: Path, cache: Path) -> tuple[Evaluation, Evaluation]:
    """Evaluate a trial's base and trained model, once.

    Args:
        trial: Which.
        folder: As in :func:`train`.
        cache: Folder of finished evaluations.

    Returns:
        Base and trained.
    """
    run = open_run(Store.open(str(folder / "store")), trial.run_id)
    found = []
    weights = STARTER_PATH / "unet" / "diffusion_pytorch_model.safetensors"
    base = sha256_bytes(weights.read_bytes())[:8]
    # Of other weights or settings, or judged otherwise, it would be another evaluation.
    judge = sha256_bytes((JUDGE_PATH / "model.safetensors").read_bytes())[:8]
    for epoch, name in ((0, f"base-{trial.task}"), (EPOCHS, trial.run_id)):
        file = cache / f"{name}-{run.identity_digest[:8] if epoch else base}-{judge}.json"
        if not file.exists():
            result = evaluate(run, epoch)
            cache.mkdir(parents=True, exist_ok=True)
            whole = file.with_suffix(f".{trial.run_id}")
            content = asdict(result) | {"rewards": result.rewards.tolist()}
            whole.write_text(json.dumps(content))
            whole.replace(file)
        stored = json.loads(file.read_text())
        found.append(Evaluation(**stored | {"rewards": np.asarray(stored["rewards"])}))
    return found[0], found[1]


def table(task: str, folder: Path) -> str:
    """Return a task's results as Markdown.

    Args:
        task: ``compressibility`` or ``incompressibility``.
        folder: As in :func:`train`.

    Returns:
        A table with a row a run, and the means.
    """
    lines = [
        f"### {task}",
        "",
        "| run | base reward | trained | gain | standard error | gain / s.e. | diversity "
        "| recognised |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains: dict[bool, list[float]] = {False: [], True: []}
    bases: list[Evaluation] = []
    for control in (False, True):
        for seed in TRAINING_SEEDS:
            trial = Trial(task, seed, control)
            base, trained = measure(trial, folder, folder / "evaluations")
            gain = Gain.of(trained, base)
            gains[control].append(gain.mean)
            bases.append(base)
            kind = "shuffled" if control else "real"
            lines.append(
                f"| {kind}, seed {seed} | {base.rewards.mean():.4f} "
                f"| {trained.rewards.mean():.4f} | {gain.mean:+.4f} | {gain.standard_error:.4f} "
                f"| {gain.standard_errors:+.1f} | {trained.diversity / base.diversity:.0%} "
                f"| {trained.recognised:.1%} |"
            )
    real, shuffled = np.mean(gains[False]), np.mean(gains[True])
    lines += [
        "",
        f"Mean gain over seeds: real {real:+.4f} (spread between seeds "
        f"{np.std(gains[False], ddof=1):.4f}), shuffled {shuffled:+.4f} (spread "
        f"{np.std(gains[True], ddof=1):.4f}), which is {shuffled / real:+.0%} of the real one. "
        f"Of the base, diversity is {bases[0].diversity:.1f} grey levels, and "
        f"{bases[0].recognised:.1%} of its animals are recognised.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, print; the tables go to docs/results.md by hand, with what they mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("ddpo-data/results"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    hide_loading_bars()
    trials = [
        Trial(task, seed, control)
        for seed in TRAINING_SEEDS
        for task in CONFIGS
        for control in (False, True)
    ]
    print(f"training {len(trials)} runs, {arguments.jobs} at a time, into {folder}", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda trial: train_and_measure(trial, folder, arguments.threads), trials))
    for task in CONFIGS:
        print("\n" + table(task, folder), flush=True)


if __name__ == "__main__":
    main()
