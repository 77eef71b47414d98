"""What training achieves: ``python -m bench.results``.

Trains three seeds of each task on the starter, each with a control whose advantages are assigned
to samples at random; compares every trained model with its base on the same prompts and noise.
Finished runs are not repeated, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bench.evaluate import SEEDS, Evaluation, Gain, evaluate
from ddpo.basics.digests import json_digest, sha256_bytes
from ddpo.config import FullConfig
from ddpo.config.files import read_config
from ddpo.models.hub import STARTERS
from ddpo.prompts import Prompt
from ddpo.prompts.sets import starter_scenes
from ddpo.runs import Run, open_run
from ddpo.starter import JUDGE_PATH
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli.quiet import hide_loading_bars

TRAINING_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """What is trained, and how it is looked at.

    Attributes:
        config: Its file.
        seeds: Noise seeds of a prompt's images.
        beyond: Prompts that training never samples, by description; evaluated too.
        shuffle: The setting that makes a control of it.
        history: The task on whose runs' saved samples it trains, in place of its own.
        sampled_as: The config whose sampler its images are evaluated with; by default its own.
        prediction_type: What a network from scratch predicts; by default what the starter's does.
    """

    config: str
    seeds: Sequence[int]
    beyond: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)
    shuffle: str = "algorithm.advantages.shuffle"
    history: str | None = None
    sampled_as: str | None = None
    prediction_type: str | None = None


HELD_OUT = starter_scenes(["activity"], held_out="only")
"""The 27 pairs of animal and activity that neither the starter's training nor ours uses."""

TASKS = {
    "compressibility": Task("configs/starter.yaml", SEEDS),
    "fast": Task("configs/starter_fast.yaml", SEEDS, sampled_as="configs/starter.yaml"),
    "flow": Task("configs/starter_flow.yaml", SEEDS),
    "nft": Task("configs/starter_nft.yaml", SEEDS),
    "awm": Task("configs/starter_awm.yaml", SEEDS),
    "dpo": Task("configs/starter_dpo.yaml", SEEDS, shuffle="algorithm.shuffle"),
    "dpo-history": Task(
        "configs/starter_dpo.yaml", SEEDS, shuffle="algorithm.shuffle", history="nft"
    ),
    # 4 prompts, 32 images each.
    "scratch": Task("configs/scratch.yaml", range(101, 133)),
    "scratch-v": Task("configs/scratch.yaml", range(101, 133), prediction_type="v_prediction"),
    "incompressibility": Task("configs/starter_incompressibility.yaml", SEEDS),
    "colorfulness": Task("configs/starter_colorfulness.yaml", SEEDS),
    # 27 prompts, 16 images each: 432 pairs.
    "counting": Task("configs/starter_counting.yaml", range(101, 117)),
    "alignment": Task(
        "configs/starter_alignment.yaml", range(101, 117), {"held-out pairs": HELD_OUT}
    ),
}


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
    """Train one trial; see :func:`train_run`."""
    task = TASKS[trial.task]
    settings = {
        "seed": trial.seed,
        task.shuffle: str(trial.control).lower(),
        "numerics.threads": threads,
    }
    if task.history:
        parent = Trial(task.history, trial.seed, control=False).run_id
        epochs = open_run(Store.open(str(folder / "store")), parent).config.epochs
        saved = f"run_id: {parent}, epoch: 0, rollouts: {epochs}, off_policy: true"
        settings |= {"fork": f"{{{saved}}}", "epochs": epochs}
    if task.prediction_type:
        settings["model.path"] = _starter_that_predicts(task.prediction_type, folder)
    train_run(trial.run_id, task.config, settings, folder)


_copying = threading.Lock()


def _starter_that_predicts(prediction_type: str, folder: Path) -> Path:
    """Return a copy of the starter that differs in what its scheduler says is predicted."""
    copy = folder / f"starter-{prediction_type}"
    with _copying:
        if not copy.exists():
            shutil.copytree(STARTERS["starter"], copy)
            file = copy / "scheduler" / "scheduler_config.json"
            settings = json.loads(file.read_text()) | {"prediction_type": prediction_type}
            file.write_text(json.dumps(settings, indent=2) + "\n")
    return copy


def train_run(run_id: str, config: str, settings: Mapping[str, object], folder: Path) -> None:
    """Train by the project's own command, in a process of its own; a finished run stays.

    Args:
        run_id: The run's name.
        config: Its file.
        settings: Overrides of the file's, by path.
        folder: Holds the store and MLflow's databases of all runs.
    """
    settings = {
        **settings,
        "tracking.uri": f"sqlite:///{folder}/mlflow-{run_id}.db",
        "tracking.system_metrics": "false",
        "outputs": folder / "outputs",
    }
    command = [sys.executable, "-m", "ddpo_workflow.flows.cli", "train", config]
    command += ["--run-id", run_id, "--root", str(folder / "store")]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    log = folder / "logs" / f"{run_id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # A Prefect home of its own: runs side by side would wait for one database.
    home = folder / "prefect" / run_id
    home.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PREFECT_HOME": str(home)}
    with log.open("w") as stream:
        done = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{run_id} failed; see {log}")
    print(f"  trained {run_id}", flush=True)


def train_and_measure(trial: Trial, folder: Path, threads: int) -> None:
    """Train a trial and evaluate it, unless that is done already."""
    train(trial, folder, threads)
    for beyond in ("", *TASKS[trial.task].beyond):
        measure(trial, folder, folder / "evaluations", beyond)


def measure(
    trial: Trial, folder: Path, cache: Path, beyond: str = ""
) -> tuple[Evaluation, Evaluation]:
    """Evaluate a trial's base and trained model, once.

    Args:
        trial: Which.
        folder: As in :func:`train`.
        cache: Folder of finished evaluations.
        beyond: Which prompts beyond the run's own; by default those.

    Returns:
        Base and trained.
    """
    run = open_run(Store.open(str(folder / "store")), trial.run_id)
    found = []
    base = _base(run)
    # Of other weights or settings, or judged otherwise, it would be another evaluation.
    judge = sha256_bytes((JUDGE_PATH / "model.safetensors").read_bytes())[:8]
    task = TASKS[trial.task]
    prompts = task.beyond[beyond] if beyond else run.prompts
    sampler = read_config(task.sampled_as).sampler if task.sampled_as else None
    asked = json_digest(
        [
            [p.text for p in prompts],
            list(task.seeds),
            run.reward.identity.digest,
            *([sampler.model_dump(mode="json")] if sampler else []),
        ]
    )
    for epoch, name in ((0, f"base-{trial.task}"), (run.config.epochs, trial.run_id)):
        of = f"{run.identity_digest[:8] if epoch else base}-{run.config.epochs if epoch else 0}"
        file = cache / f"{name}-{of}-{judge}-{asked[:8]}.json"
        if not file.exists():
            result = evaluate(run, epoch, seeds=task.seeds, prompts=prompts, sampler=sampler)
            cache.mkdir(parents=True, exist_ok=True)
            whole = file.with_suffix(f".{trial.run_id}")
            content = asdict(result) | {"rewards": result.rewards.tolist()}
            whole.write_text(json.dumps(content))
            whole.replace(file)
        stored = json.loads(file.read_text())
        found.append(Evaluation(**stored | {"rewards": np.asarray(stored["rewards"])}))
    return found[0], found[1]


def _base(run: Run) -> str:
    """Return eight digits of the network that a run starts from, which may be its own."""
    trainable = run.config.trainable
    if isinstance(trainable, FullConfig) and trainable.from_scratch:
        first = CHECKPOINT.require(run.store, Partition(run.run_id, 0))
        return first.digests["policy_digest"][:8]
    part = "transformer" if run.config.model.path == "starter_flow" else "unet"
    weights = STARTERS[run.config.model.path] / part / "diffusion_pytorch_model.safetensors"
    return sha256_bytes(weights.read_bytes())[:8]


def table(task: str, folder: Path, beyond: str = "") -> str:
    """Return a task's results as Markdown.

    Args:
        task: One of `TASKS`.
        folder: As in :func:`train`.
        beyond: As in :func:`measure`.

    Returns:
        A table with a row a run, and the means.
    """
    lines = [
        f"### {task}{', ' + beyond if beyond else ''}",
        "",
        "| run | base reward | trained | gain | standard error | gain / s.e. | diversity "
        "| recognized |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains: dict[bool, list[float]] = {False: [], True: []}
    bases: list[Evaluation] = []
    for control in (False, True):
        for seed in TRAINING_SEEDS:
            trial = Trial(task, seed, control)
            base, trained = measure(trial, folder, folder / "evaluations", beyond)
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
        f"For the base, diversity is {np.mean([each.diversity for each in bases]):.1f} gray "
        f"levels, and {np.mean([each.recognised for each in bases]):.1%} of its images show what "
        "the prompt names.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, print; the tables go to docs/results.md by hand, with what they mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("ddpo-data/results"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    hide_loading_bars()
    trials = [
        Trial(task, seed, control)
        for seed in TRAINING_SEEDS
        for task in arguments.tasks
        for control in (False, True)
    ]
    print(f"training {len(trials)} runs, {arguments.jobs} at a time, into {folder}", flush=True)
    # What others train on comes first.
    for waits in (False, True):
        due = [trial for trial in trials if bool(TASKS[trial.task].history) is waits]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda trial: train_and_measure(trial, folder, arguments.threads), due))
    for task in arguments.tasks:
        for beyond in ("", *TASKS[task].beyond):
            print("\n" + table(task, folder, beyond), flush=True)


if __name__ == "__main__":
    main()
