"""A training loop that survives being killed: step k depends only on the state and k."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EMA_DECAY = 0.999
WARMUP = 0.04
"""Share of the steps in which the learning rate rises from 0; then it decays to 0 as a cosine."""

CHECKPOINT_EVERY = 100

SHARDS = 2
"""Every batch is computed in this many equal parts, each by a Python thread on one core.

torch's own threads synchronise in every operation: on two cores, one of them used by another
process, they trained at a tenth of the speed. These synchronise once per step.
"""

console = Console()


@dataclass(frozen=True)
class Budget:
    """How long a stage trains.

    Raises:
        ValueError: The batch does not divide into equal parts.
    """

    pictures: int
    """Images seen in total."""
    batch: int
    """Images per step."""
    lr: float
    """Highest learning rate."""

    def __post_init__(self) -> None:
        if self.batch % SHARDS or self.pictures < self.batch:
            raise ValueError(
                f"a batch of {self.batch} of {self.pictures} pictures: expected a multiple of "
                f"{SHARDS}, at most as large as the budget"
            )

    @property
    def shard(self) -> int:
        """Images per part of a step."""
        return self.batch // SHARDS

    @property
    def steps(self) -> int:
        """Whole batches in the budget."""
        return self.pictures // self.batch


def learning_rate(budget: Budget, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    done = (step + 1) / budget.steps
    if done < WARMUP:
        return budget.lr * done / WARMUP
    return budget.lr * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    yield temporary
    temporary.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with sorted keys, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


class Trainee:
    """A module with all state that its training carries from step to step."""

    def __init__(self, module: nn.Module, lr: float) -> None:
        self.module = module
        self.parameters = dict(module.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        """Exponential moving average of the parameters, by name."""
        self.step = 0
        """Steps done."""
        self.curve: list[float] = []
        """Mean loss of every 100 steps, and of the rest at the end."""
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    def advance(self, gradients: list[tuple[Tensor, ...]], lr: float) -> None:
        """Take one optimizer step and update the average.

        Args:
            gradients: Gradients of each shard's mean loss, in the order of the parameters.
            lr: Learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for parameter, *parts in zip(self.parameters.values(), *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(0)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # Short at first, or the initial random weights would remain in the average.
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)

    def save(self, path: Path) -> None:
        """Write the state as one safetensors file, atomically."""
        tensors = {"step": torch.tensor(self.step), "curve": torch.tensor(self.curve)}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {
                f"model/{name}": parameter.detach().contiguous(),
                f"ema/{name}": self.ema[name].contiguous(),
                f"exp_avg/{name}": state["exp_avg"].contiguous(),
                f"exp_avg_sq/{name}": state["exp_avg_sq"].contiguous(),
            }
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    def load(self, path: Path) -> None:
        """Restore the state from a file written by `save`."""
        tensors = load_file(path)
        self.step = int(tensors["step"])
        self.curve = tensors["curve"].tolist()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model/{name}"])
                self.ema[name].copy_(tensors[f"ema/{name}"])
                # `zeros_like` keeps the parameter's memory format, which the fused step expects.
                moments = {
                    key: torch.zeros_like(parameter).copy_(tensors[f"{key}/{name}"])
                    for key in ("exp_avg", "exp_avg_sq")
                }
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **moments,
                }


@contextmanager
def one_core_each() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of `SHARDS` threads; there and outside of it, torch uses one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def saved_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint, or 0 if there is none."""
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, framework="pt") as tensors:
        return int(tensors.get_tensor("step"))


def load_ema(module: nn.Module, path: Path) -> int:
    """Load the averaged weights of a checkpoint into a module; return its step."""
    tensors = load_file(path)
    module.load_state_dict(
        {name: tensors[f"ema/{name}"] for name, _ in module.named_parameters()}, strict=False
    )
    return int(tensors["step"])


def fit(
    name: str,
    module: nn.Module,
    loss_of_shard: Callable[[int, int], Tensor],
    budget: Budget,
    checkpoint: Path,
) -> None:
    """Train a module to the end of its budget, from the checkpoint if there is one.

    Args:
        name: Name of the stage, for display.
        module: The module, trained in place.
        loss_of_shard: Returns a scalar loss for step k and part 0 or 1 of its batch, with
            randomness derived from these two.
        budget: Length and learning rate of the training.
        checkpoint: A safetensors file, written every 100 steps and at the end.
    """
    trainee = Trainee(module, budget.lr)
    if checkpoint.exists():
        trainee.load(checkpoint)
    parameters = list(trainee.parameters.values())

    def gradients_of_shard(shard: int) -> tuple[float, tuple[Tensor, ...]]:
        loss = loss_of_shard(trainee.step, shard)
        return loss.item(), torch.autograd.grad(loss, parameters)

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note = TextColumn("left  {task.fields[note]}")
    with Progress(*columns, note, console=console) as progress, one_core_each() as pool:
        bar = progress.add_task(name, total=budget.steps, completed=trainee.step, note="")
        started, first = time.monotonic(), trainee.step
        losses: list[float] = []
        while trainee.step < budget.steps:
            parts = list(pool.map(gradients_of_shard, range(SHARDS)))
            trainee.advance([part[1] for part in parts], learning_rate(budget, trainee.step))
            losses += [part[0] for part in parts]
            if trainee.step % CHECKPOINT_EVERY == 0 or trainee.step == budget.steps:
                trainee.curve.append(sum(losses) / len(losses))
                trainee.save(checkpoint)
                pace_s = (time.monotonic() - started) / (trainee.step - first)
                note = f"loss {trainee.curve[-1]:.4f}"
                progress.update(bar, note=note)
                console.log(
                    f"{name} step {trainee.step}/{budget.steps}: {note}, "
                    f"{1000 * pace_s / budget.batch:.1f} ms per image, "
                    f"{(budget.steps - trainee.step) * pace_s / 60:.1f} min left"
                )
                losses.clear()
            progress.update(bar, completed=trainee.step)
