"""Processes and windows of flow matching at equal time: ``python -m bench.flow_processes``.

Trains the flow starter by ``configs/starter_flow.yaml`` with each of them, for as many epochs as
take the CPU time of the config's own, and compares what they gain on the same prompts and noise,
sampled without noise. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.evaluate import Gain, evaluate
from bench.results import train_run
from ddpo.config.files import read_config
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_numerics
from ddpo.runs import open_run
from ddpo.store.objects import Store
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from ddpo_workflow.flows.cli.quiet import hide_loading_bars

CONFIG = "configs/starter_flow.yaml"
VARIANTS: Mapping[str, Mapping[str, str]] = {
    "sde": {},
    "cps": {"sampler.type": "flow_cps"},
    "sde-one-step": {"sampler.window": "{position: 0, steps: 1}"},
    "sde-moving": {"sampler.window": "{position: moving, steps: 2, move_every: 2}"},
    "sde-all-steps": {"sampler.window": "null"},
}
"""What differs from the config, by name. The first one's epochs are the measure."""

_ROUNDS = 3


def seconds_per_epoch(threads: int) -> dict[str, float]:
    """Return the CPU seconds of an epoch's sampling and updates, by variant: medians of rounds."""
    torch.set_num_threads(threads)
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(_ROUNDS):
        for name, changes in VARIANTS.items():
            found[name].append(_epoch(changes))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _epoch(changes: Mapping[str, str]) -> float:
    config = read_config(CONFIG, [f"{name}={value}" for name, value in changes.items()])
    policy = load_policy(config.model, config.trainable, resolve_numerics(config.numerics), seed=0)
    count, shard = config.rollouts.samples_per_epoch, config.rollouts.shard_size
    prompts, sampler = ["a cat"] * shard, sampler_of_epoch(policy, config, 0)
    began = time.process_time()
    shards = [sample(policy, prompts, list(range(shard)), sampler) for _ in range(count // shard)]
    sampled = time.process_time() - began
    credit = {"reward": torch.zeros(shard), "advantage": torch.tensor([1.0, -1.0] * (shard // 2))}
    rollouts = Rollouts(prompts, shards[0].latents, shards[0].log_probs)
    began = time.process_time()
    update(policy, initial_state(policy), rollouts, credit, {}, config)
    return sampled + (time.process_time() - began) * count / shard


def _measured_once(file: Path, threads: int) -> dict[str, float]:
    """Return what was measured before, by which finished runs got their epochs; or measure it."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(seconds_per_epoch(threads)))
    return json.loads(file.read_text())


@dataclass(frozen=True)
class Outcome:
    """What a variant's run of one seed has learned."""

    gain: Gain
    diversity: float
    """Of the base's, as a share."""
    recognised: float


def measure(run_id: str, folder: Path) -> Outcome:
    """Evaluate a finished run and its base without noise."""
    run = open_run(Store.open(str(folder / "store")), run_id)
    sampler = run.config.sampler.at_inference(0.0)
    base, trained = (evaluate(run, epoch, sampler=sampler) for epoch in (0, run.config.epochs))
    share = trained.diversity / base.diversity
    return Outcome(Gain.of(trained, base), share, trained.recognised)


def table(
    seconds: Mapping[str, float],
    epochs: Mapping[str, int],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> str:
    """Return the comparison as Markdown, a row a variant."""
    lines = [
        "| variant | seconds an epoch | epochs | gain, by seed | mean | diversity | recognized |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in outcomes.items():
        gains = ", ".join(
            f"{each.gain.mean:+.3f} ({each.gain.standard_errors:.0f})" for each in found
        )
        lines.append(
            f"| {name} | {seconds[name]:.1f} | {epochs[name]} | {gains} "
            f"| {np.mean([each.gain.mean for each in found]):+.3f} "
            f"| {np.mean([each.diversity for each in found]):.0%} "
            f"| {np.mean([each.recognised for each in found]):.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, train, evaluate, print; the table goes to docs/results.md by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("ddpo-data/flow-processes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    hide_loading_bars()
    seconds = _measured_once(folder / "seconds.json", arguments.threads)
    first = next(iter(VARIANTS))
    budget = read_config(CONFIG, []).epochs * seconds[first]
    epochs = {name: max(round(budget / each), 1) for name, each in seconds.items()}
    for name in VARIANTS:
        print(f"  {name}: {seconds[name]:.1f} s an epoch, {epochs[name]} epochs", flush=True)

    def train(name: str, seed: int) -> None:
        settings = {"seed": seed, "numerics.threads": arguments.threads, "epochs": epochs[name]}
        train_run(f"{name}-seed{seed}", CONFIG, {**settings, **VARIANTS[name]}, folder)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(train, name, seed) for seed in arguments.seeds for name in VARIANTS]
        for job in jobs:
            job.result()
    outcomes = {
        name: [measure(f"{name}-seed{seed}", folder) for seed in arguments.seeds]
        for name in VARIANTS
    }
    print("\n" + table(seconds, epochs, outcomes), flush=True)


if __name__ == "__main__":
    main()
