"""Settings compared at equal time: ``python -m bench.equal_time flow``, or ``less``.

Trains a starter by a config and by variants of it, each for as many epochs as take the CPU time of
the first one's, and compares what they gain on the same prompts and noise. ``flow`` compares
processes and windows of `configs/starter_flow.yaml`, sampled without noise; ``less`` compares what
leaves work out of `configs/starter.yaml`, sampled as the config does. Finished runs are not
repeated.
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
from ddpo.config.sampler import AnySampler
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_numerics
from ddpo.runs import open_run
from ddpo.store.objects import Store
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from ddpo_workflow.flows.cli.quiet import hide_loading_bars

Changes = Mapping[str, str]


@dataclass(frozen=True)
class Study:
    """A config and variants of it, which are compared."""

    config: str
    variants: Mapping[str, Changes]
    """What differs from the config, by name. The first one's epochs are the measure."""
    epochs: int
    """Of the first variant."""
    noise: bool
    """Whether images are evaluated as the config samples them, or without noise."""

    def sampler(self) -> AnySampler:
        """Return the sampler of evaluations, which all variants share."""
        sampler = read_config(self.config).sampler
        return sampler if self.noise else sampler.at_inference(0.0)


STUDIES = {
    "flow": Study(
        "configs/starter_flow.yaml",
        {
            "sde": {},
            "cps": {"sampler.type": "flow_cps"},
            "sde-one-step": {"sampler.window": "{position: 0, steps: 1}"},
            "sde-moving": {"sampler.window": "{position: moving, steps: 2, move_every: 2}"},
            "sde-all-steps": {"sampler.window": "null"},
        },
        epochs=8,
        noise=False,
    ),
    "less": Study(
        "configs/starter.yaml",
        {
            "all-steps": {"sampler.window": "null"},
            "window": {},
            "ahead": {"rollouts.sample_ahead": "true"},
            "ahead-clipped": {
                "rollouts.sample_ahead": "true",
                "algorithm.clip_range": "0.001",
            },
            "first-step": {"sampler.window": "{position: 0, steps: 1}"},
            "three-steps": {"sampler.steps": "3", "sampler.window": "{position: 0, steps: 2}"},
            "shared-start": {
                "rollouts.samples_per_prompt": "8",
                "rollouts.shared_start": "true",
                "sampler.window": "{position: 0, steps: 1, noise_only_there: true}",
                "algorithm.advantages": "{type: group, deviation: batch}",
            },
        },
        epochs=4,
        noise=True,
    ),
}

_ROUNDS = 3


def seconds_per_epoch(study: Study, threads: int) -> dict[str, float]:
    """Return the CPU seconds of an epoch's sampling and updates, by variant: medians of rounds."""
    torch.set_num_threads(threads)
    found: dict[str, list[float]] = {name: [] for name in study.variants}
    for _ in range(_ROUNDS):
        for name, changes in study.variants.items():
            found[name].append(_epoch(study.config, changes))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _epoch(file: str, changes: Changes) -> float:
    config = read_config(file, [f"{name}={value}" for name, value in changes.items()])
    policy = load_policy(config.model, config.trainable, resolve_numerics(config.numerics), seed=0)
    rollouts = config.rollouts
    count, shard = rollouts.samples_per_epoch, rollouts.shard_size
    prompts, sampler = ["a cat"] * shard, sampler_of_epoch(policy, config, 0)
    groups = [row // rollouts.samples_per_prompt for row in range(shard)]
    starts = groups if rollouts.shared_start else None
    began = time.process_time()
    shards = [
        sample(policy, prompts, list(range(shard)), sampler, starts=starts)
        for _ in range(count // shard)
    ]
    sampled = time.process_time() - began
    credit = {"reward": torch.zeros(shard), "advantage": torch.tensor([1.0, -1.0] * (shard // 2))}
    samples = Rollouts(prompts, shards[0].latents, shards[0].log_probs)
    began = time.process_time()
    update(policy, initial_state(policy), samples, credit, {}, config)
    return sampled + (time.process_time() - began) * count / shard


def _measured_once(study: Study, file: Path, threads: int) -> dict[str, float]:
    """Return what was measured before, by which finished runs got their epochs; or measure it."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(seconds_per_epoch(study, threads)))
    return json.loads(file.read_text())


@dataclass(frozen=True)
class Outcome:
    """What a variant's run of one seed has learned."""

    gain: Gain
    diversity: float
    """Of the base's, as a share."""
    recognised: float


def measure(run_id: str, folder: Path, sampler: AnySampler) -> Outcome:
    """Evaluate a finished run and its base with a sampler."""
    run = open_run(Store.open(str(folder / "store")), run_id)
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
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--folder", type=Path, default=Path("ddpo-data/equal-time"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    folder = arguments.folder.absolute() / arguments.study
    hide_loading_bars()
    seconds = _measured_once(study, folder / "seconds.json", arguments.threads)
    budget = study.epochs * seconds[next(iter(study.variants))]
    epochs = {name: max(round(budget / each), 1) for name, each in seconds.items()}
    for name in study.variants:
        print(f"  {name}: {seconds[name]:.1f} s an epoch, {epochs[name]} epochs", flush=True)

    def train(name: str, seed: int) -> None:
        settings = {"seed": seed, "numerics.threads": arguments.threads, "epochs": epochs[name]}
        changes = study.variants[name]
        train_run(f"{name}-seed{seed}", study.config, {**settings, **changes}, folder)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(train, name, seed) for seed in arguments.seeds for name in study.variants
        ]
        for job in jobs:
            job.result()
    outcomes = {
        name: [measure(f"{name}-seed{seed}", folder, study.sampler()) for seed in arguments.seeds]
        for name in study.variants
    }
    print("\n" + table(seconds, epochs, outcomes), flush=True)


if __name__ == "__main__":
    main()
