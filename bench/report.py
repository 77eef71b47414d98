"""What all benches report: seconds of rounds that alternate, and the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import JsonValue


@dataclass(frozen=True)
class Seconds:
    """What a piece of work took."""

    cpu: float
    """CPU time of this process: what other processes do hardly matters to it."""
    wall: float
    """Time that passed."""


def timed(work: Callable[[], object]) -> Seconds:
    """Do a piece of work, and return what it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def alternate(sides: Mapping[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """Measure several ways in turn, each round in the opposite order of the one before.

    Args:
        sides: The ways by name; each does its work once and returns what it took.
        rounds: How often each is measured, after one round that is not counted.

    Returns:
        What each round took, by name. A line is printed after each round.
    """
    names = list(sides)
    found: dict[str, list[Seconds]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            took = sides[name]()
            if number:
                found[name].append(took)
        if number:
            last = ", ".join(f"{name} {took[-1].cpu:.2f} s" for name, took in found.items())
            print(f"round {number} of {rounds}: {last}", flush=True)
    return found


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, the smallest and the largest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Describe the values of some rounds, of one at least."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def ratios(numerator: Sequence[Seconds], denominator: Sequence[Seconds]) -> Spread:
    """Return the ratio of CPU times, round by round."""
    return Spread.of([n.cpu / d.cpu for n, d in zip(numerator, denominator, strict=True)])


def seconds_cell(rounds: Sequence[Seconds]) -> str:
    """Return a table's cell: the medians of CPU time and of wall time."""
    cpu = statistics.median([each.cpu for each in rounds])
    wall = statistics.median([each.wall for each in rounds])
    return f"{cpu:.3g} s ({wall:.3g} s)"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table.

    Args:
        head: The columns' names.
        rows: The cells of each row.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def machine() -> dict[str, JsonValue]:
    """Describe this machine and what computes on it."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "diffusers", "peft")},
    }


def write_json(
    file: Path | None, bench: str, figures: Mapping[str, Sequence[Seconds]], **settings: JsonValue
) -> None:
    """Write what was measured as JSON.

    Args:
        file: Created or replaced; None writes nothing.
        bench: The bench's name.
        figures: What the rounds of each way took.
        **settings: What was measured: sizes, batches.
    """
    took = {name: [asdict(each) for each in rounds] for name, rounds in figures.items()}
    write_record(file, bench, settings, seconds=took)


def write_record(
    file: Path | None, bench: str, settings: Mapping[str, JsonValue], **measured: object
) -> None:
    """Write figures of any kind as JSON, with the machine's description.

    Args:
        file: Created or replaced; None writes nothing.
        bench: The bench's name.
        settings: What was measured: sizes, batches.
        **measured: The figures by what they are, such as ``seconds``; plain JSON.
    """
    if file is None:
        return
    whole = {"bench": bench, "machine": machine(), "settings": dict(settings), **measured}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole, indent=2) + "\n")


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
