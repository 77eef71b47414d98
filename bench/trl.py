"""Whole epochs against TRL's DDPO trainer: ``python -m bench.trl``.

The same pipeline, prompts, reward, steps, guidance, adapter and dtype, one thread each, all steps
trained. TRL runs in an environment of its own, which is made once: its last version with this
trainer needs older libraries. Sampling, scoring, advantages and update are measured on both sides,
saving on neither.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.report import (
    Seconds,
    alternate,
    machine,
    ratios,
    seconds_cell,
    table,
    timed,
    write_json,
)
from ddpo.algorithms.base import PromptStatistics, Scored
from ddpo.basics.randomness import derive_seed, generator
from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_numerics
from ddpo.prompts import draw_prompt, load_prompts
from ddpo.rewards import load_reward, score_images
from ddpo.starter import STARTER_PATH
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts

TORCH = "torch==2.13.0"
PACKAGES = (
    "trl==0.11.4",
    "diffusers==0.30.3",
    "transformers==4.45.2",
    "peft==0.13.2",
    "accelerate==1.0.1",
    "huggingface_hub<0.27",
    "numpy<2.3",
    "rich",
)
"""TRL's last version with the trainer (0.11 is the last whose loader reads such pipelines without
a change), and what was current with it."""


@dataclass(frozen=True)
class Batches:
    """How TRL cuts an epoch."""

    name: str
    sample: int
    train: int
    least: float
    """How many times as fast ours should be."""


def batches_of(samples: int) -> tuple[Batches, Batches]:
    """Return TRL's published batches (its example script's), and those that are its best here."""
    return Batches("published", 6, 3, 1.8), Batches("its best", samples, samples, 1.35)


def environment(folder: Path) -> Path:
    """Return the Python of TRL's environment; make the environment if it is not there.

    Args:
        folder: Where it is kept.
    """
    python = folder / "bin/python"
    ready = folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first and by itself: an exact version keeps pip from weighing other builds of it.
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, *PACKAGES], check=True)
        ready.touch()
    return python


def pipeline_for_older_libraries(folder: Path) -> Path:
    """Write the starter as TRL's loader reads it: the tokenizer as vocabulary and merges.

    Args:
        folder: Replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(STARTER_PATH, folder)
    tokenizer = folder / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tokenizer / "tokenizer.json").unlink()
    return folder


class TrlEpochs:
    """TRL's trainer in a process of its own.

    Args:
        process: Runs `bench/trl_worker.py`.
        settings: What it is told first.
    """

    def __init__(self, process: subprocess.Popen[str], settings: Mapping[str, object]) -> None:
        self._process = process
        self.rewards: list[float] = []
        self._tell(json.dumps(settings))

    def epoch(self) -> Seconds:
        """Run one epoch."""
        self._tell("epoch")
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("TRL's process ended; its messages are above")
        answer = json.loads(line)
        self.rewards.append(answer.pop("reward"))
        return Seconds(**answer)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@contextmanager
def trl_epochs(
    python: Path, pipeline: Path, config: RunConfig, batches: Batches
) -> Iterator[TrlEpochs]:
    """Start TRL's trainer; it ends with the block.

    Args:
        python: TRL's.
        pipeline: What it trains.
        config: Ours, whose settings it gets.
        batches: How it cuts an epoch.
    """
    samples = config.rollouts.samples_per_epoch
    known = load_prompts(config.prompts.name, config.prompts.parameters)
    settings = {
        "pipeline": str(pipeline),
        "prompts": [prompt.text for prompt in known],
        "samples": samples,
        "steps": config.sampler.steps,
        "guidance_scale": config.sampler.guidance_scale,
        "sample_batch": batches.sample,
        "train_batch": batches.train,
        # One optimizer step an epoch, as ours: its cost is not what is compared.
        "accumulated": samples // batches.train,
        "learning_rate": config.optimizer.learning_rate,
    }
    # -P: this folder has a trl.py, which is not TRL.
    command = [python, "-P", Path(__file__).with_name("trl_worker.py")]
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **offline, "PYTHONPATH": ""},
    )
    try:
        yield TrlEpochs(process, settings)
    finally:
        process.kill()
        process.wait()


class OurEpochs:
    """The same epochs by the library.

    Args:
        config: A run whose epoch is one update.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.policy = load_policy(
            config.model, config.trainable, resolve_numerics(config.numerics), seed=config.seed
        )
        self.known = load_prompts(config.prompts.name, config.prompts.parameters)
        self.reward = load_reward(config.reward.name, config.reward.parameters)
        self.state = initial_state(self.policy)
        self.rewards: list[float] = []

    def epoch(self) -> Seconds:
        """Run one epoch, from where the one before has led."""
        return timed(self._epoch)

    def _epoch(self) -> None:
        config, epoch = self.config, self.state.epoch
        indices = range(config.rollouts.samples_per_epoch)
        asked = [
            draw_prompt(self.known, generator(derive_seed(config.seed, "prompt", epoch, index)))
            for index in indices
        ]
        texts = [prompt.text for prompt in asked]
        seeds = [derive_seed(config.seed, "noise", epoch, index) for index in indices]
        sampler = sampler_of_epoch(self.policy, config, epoch)
        drawn = sample(self.policy, texts, seeds, sampler)
        scores = score_images(self.reward, drawn.images, asked).values
        self.rewards.append(float(scores.mean()))
        statistics: PromptStatistics = self.state.statistics
        credit = config.algorithm.credit(Scored(texts, scores.astype(np.float64)), statistics)
        columns = {"reward": scores, **credit.columns}
        tensors = {name: torch.tensor(each, dtype=torch.float32) for name, each in columns.items()}
        rollouts = Rollouts(texts, drawn.latents, drawn.log_probs)
        self.state, _ = update(
            self.policy, self.state, rollouts, tensors, credit.statistics, config
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        arguments: Of the command line, by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=48, help="of an epoch; a multiple of 6")
    parser.add_argument("--environment", type=Path, default=Path("build/trl"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    config = read_config(
        "configs/starter.yaml",
        [
            f"rollouts.samples_per_epoch={given.samples}",
            f"rollouts.shard_size={given.samples}",
            f"numerics.sample_batch_size={given.samples}",
            f"numerics.micro_batch_size={given.samples}",
            "numerics.threads=1",
            "sampler.window=null",
            "algorithm={type: ddpo_is, updates_per_epoch: 1, advantages: {type: batch}}",
            "optimizer={learning_rate: 3.0e-4}",
        ],
    )
    python = environment(given.environment.resolve())
    pipeline = pipeline_for_older_libraries(given.environment.resolve() / "starter")
    ours = OurEpochs(config)
    published, best = batches_of(given.samples)
    with (
        trl_epochs(python, pipeline, config, published) as small,
        trl_epochs(python, pipeline, config, best) as large,
    ):
        sides = {"ours": ours.epoch, published.name: small.epoch, best.name: large.epoch}
        took = alternate(sides, given.rounds)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        f"epochs of {given.samples} samples, {config.sampler.steps} steps, guidance "
        f"{config.sampler.guidance_scale:g}; medians of {given.rounds} rounds, CPU time of one "
        "thread (wall time)\n"
    )
    rows = [["ours", given.samples, given.samples, seconds_cell(took["ours"]), "", "", ""]]
    for each in (published, best):
        theirs = took[each.name]
        faster = str(ratios(theirs, took["ours"]))
        rows.append(
            [f"TRL, {each.name}", each.sample, each.train, seconds_cell(theirs), faster, each.least]
        )
    head = ["", "sampling batch", "training batch", "an epoch", "ours is as fast", "target"]
    print(table(head, [row[: len(head)] for row in rows]))
    for name, rewards in (("ours", ours.rewards), ("TRL", small.rewards), ("TRL", large.rewards)):
        print(f"mean rewards of {name}: {', '.join(f'{reward:.2f}' for reward in rewards)}")
    write_json(given.json, "trl", took, samples=given.samples, trl=list(PACKAGES))


if __name__ == "__main__":
    main()
