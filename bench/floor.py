"""How close sampling and update come to a bare loop: ``python -m bench.floor``.

The library draws and trains one batch of a config (`configs/starter.yaml`). The floor is what
nobody can leave out in eager PyTorch: the same forwards of the same UNet with the same adapter at
the same batch, the decoder, and a backward for each trained step. Both are measured in turn in one
process with one thread, by CPU time. The bare loop predicts each sample in each step; so with
`--config configs/starter_fast.yaml`, the ratio is what samples with shared starts save. With
`--compile`, the blocks of the UNet are compiled on both sides, in rounds that are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.diffusion.sampling import Trajectories, sample
from ddpo.diffusion.window import sampler_of_epoch, window_steps
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_numerics
from ddpo.models.pipeline_policy import PipelinePolicy
from ddpo.prompts import load_prompts
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts

MOST = 1.1
"""The ratio that the library's sampling and update should not exceed."""


class Batch:
    """An epoch's samples of a run on a UNet, drawn and trained by the library, and by a bare loop.

    Args:
        config: A run with guidance; its model is loaded.
        drawn: Samples to train on, repeated until they are an epoch's; by default they are drawn.
    """

    def __init__(self, config: RunConfig, drawn: Trajectories | None = None) -> None:
        policy = load_policy(
            config.model, config.trainable, resolve_numerics(config.numerics), seed=config.seed
        )
        assert isinstance(policy, PipelinePolicy)
        self.policy, self.config = policy, config
        self.sampler = sampler_of_epoch(policy, config, epoch=0)
        self.size = config.rollouts.samples_per_epoch
        known = load_prompts(config.prompts.name, config.prompts.parameters)
        groups = [row // config.rollouts.samples_per_prompt for row in range(self.size)]
        self.prompts = [known[group % len(known)].text for group in groups]
        self.starts = groups if config.rollouts.shared_start else None
        drawn = drawn or self.sample()
        rows = torch.arange(self.size) % len(drawn.latents)
        self.rollouts = Rollouts(self.prompts, drawn.latents[rows], drawn.log_probs[rows])
        self.times = drawn.times.tolist()
        # Both signs, none zero: no pair can be left out.
        signs = torch.tensor([1.0, -1.0]).repeat(self.size)[: self.size]
        self.credit = {"reward": signs, "advantage": signs}
        self.state = initial_state(policy)
        # What a bare loop is given: latents and text of both halves of guidance.
        text = policy.encode(["", *self.prompts])["text"]
        self.text = torch.cat([text[:1].expand(self.size, *text.shape[1:]), text[1:]])

    def sample(self) -> Trajectories:
        """Draw the samples with the library."""
        return sample(self.policy, self.prompts, range(self.size), self.sampler, starts=self.starts)

    def update(self, rollouts: Rollouts | None = None) -> None:
        """Train on the samples with the library, from the same weights each time."""
        self.policy.weights.load(self.state.weights)
        update(self.policy, self.state, rollouts or self.rollouts, self.credit, {}, self.config)

    def epoch(self) -> None:
        """Draw samples with the library, and train on them."""
        drawn = self.sample()
        self.update(Rollouts(self.prompts, drawn.latents, drawn.log_probs))

    def bare_sampling(self) -> None:
        """Run the forwards that drawing the samples takes, and decode, batch by batch."""
        for rows in self._batches():
            self.bare_forwards(rows)
            self.bare_decoder(rows)

    @torch.no_grad()
    def bare_forwards(self, rows: slice | None = None) -> None:
        """Run the forwards that drawing a sampler batch takes; by default every batch's."""
        for batch in [rows] if rows else self._batches():
            for step in range(len(self.times)):
                self._forward(step, batch)

    @torch.no_grad()
    def bare_decoder(self, rows: slice | None = None) -> None:
        """Decode a sampler batch; by default every batch."""
        vae: Any = self.policy.pipeline.vae
        for batch in [rows] if rows else self._batches():
            latents = self.rollouts.latents[batch, -1].to(self.policy.device)
            vae.decode(latents / vae.config.scaling_factor, return_dict=False)

    def bare_backwards(self) -> None:
        """Run the forwards and backwards that training on the samples takes."""
        size = self.policy.numerics.micro_batch_size
        for step in window_steps(self.sampler):
            for start in range(0, self.size, size):
                self._forward(step, slice(start, start + size)).square().mean().backward()
        for parameter in self.policy.weights.parameters().values():
            parameter.grad = None

    def _batches(self) -> list[slice]:
        size = self.policy.numerics.sample_batch_size
        return [slice(start, start + size) for start in range(0, self.size, size)]

    def _forward(self, step: int, rows: slice) -> Tensor:
        latents = self.rollouts.latents[rows, step].to(self.policy.device)
        both = torch.cat([latents, latents])
        text = torch.cat([self.text[: self.size][rows], self.text[self.size :][rows]])
        times = torch.full((len(both),), self.times[step], device=both.device)
        return self.policy.network(both, times, text, return_dict=False)[0]


@dataclass(frozen=True)
class Floor:
    """What the rounds took, by what was done."""

    seconds: dict[str, list[Seconds]]

    def rows(self) -> list[list[str]]:
        """Return the table's rows: what was done, both times, and their ratio by CPU time."""
        took = self.seconds
        drawing = [_both(*each) for each in zip(took["forwards"], took["decoder"], strict=True)]
        epoch = [_both(*each) for each in zip(took["sample"], took["update"], strict=True)]
        bare = [_both(*each) for each in zip(drawing, took["backwards"], strict=True)]
        compared = {
            "sampling": (took["sample"], drawing),
            "update": (took["update"], took["backwards"]),
            "both": (epoch, bare),
        }
        return [
            [name, seconds_cell(ours), seconds_cell(floor), str(ratios(ours, floor))]
            for name, (ours, floor) in compared.items()
        ]


def _both(first: Seconds, second: Seconds) -> Seconds:
    return Seconds(first.cpu + second.cpu, first.wall + second.wall)


def measure(config: RunConfig, rounds: int) -> Floor:
    """Measure a config's batch.

    Args:
        config: As for :class:`Batch`.
        rounds: How often each part is measured, in turn.
    """
    batch = Batch(config)
    if config.numerics.compile:
        batch.epoch()
        batch.bare_sampling()
        batch.bare_backwards()
    sides = {
        "sample": batch.sample,
        "forwards": batch.bare_forwards,
        "decoder": batch.bare_decoder,
        "update": batch.update,
        "backwards": batch.bare_backwards,
    }
    return Floor(alternate({name: lambda w=work: timed(w) for name, work in sides.items()}, rounds))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        arguments: Of the command line, by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/starter.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    config = read_config(
        given.config,
        [
            f"rollouts.samples_per_epoch={given.batch}",
            f"rollouts.shard_size={given.batch}",
            f"numerics.sample_batch_size={given.batch}",
            f"numerics.micro_batch_size={given.batch}",
            "numerics.threads=1",
            f"numerics.compile={str(given.compile).lower()}",
            "algorithm.updates_per_epoch=1",
        ],
    )
    floor = measure(config, given.rounds)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        f"{given.batch} samples; medians of {given.rounds} rounds, CPU time of one thread (wall "
        f"time); the ratio, with the smallest and largest, should be at most {MOST}\n"
    )
    print(table(["", "library", "bare loop", "ratio"], floor.rows()))
    write_json(
        given.json,
        "floor",
        floor.seconds,
        config=str(given.config),
        batch=given.batch,
        compiled=given.compile,
    )


if __name__ == "__main__":
    main()
