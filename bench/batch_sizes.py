"""What sampling and update cost by batch size: ``python -m bench.batch_sizes``.

The library draws and trains the same samples of a config in batches of each size, in turn in one
process with one thread, by CPU time. At the end, it says what `auto` takes here, and what it
measured (`ddpo/runs/batch_search.py`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.floor import Batch
from bench.report import Seconds, alternate, machine, table, timed, write_json
from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.runs.batch_choice import candidates
from ddpo.runs.batch_search import BatchSearch


def measure(batch: Batch, rounds: int) -> dict[str, list[Seconds]]:
    """Measure a batch's samples by the size of the forwards.

    Args:
        batch: The samples, all drawn and trained in each round.
        rounds: How often each size is measured, in turn.

    Returns:
        What the rounds took, as ``sample 8`` and ``update 8``.
    """

    def in_batches(part: str, size: int) -> Seconds:
        batch.policy.numerics = batch.policy.numerics.batched(size, size, compiled=False)
        return timed(batch.sample if part == "sample" else batch.update)

    sides = {
        f"{part} {size}": partial(in_batches, part, size)
        for part in ("sample", "update")
        for size in candidates(batch.size, batch.size)
    }
    return alternate(sides, rounds)


def rows(seconds: Mapping[str, Sequence[Seconds]], samples: int) -> list[list[str]]:
    """Return the table's rows: a size, and what a sample takes, also as a multiple of the least.

    Args:
        seconds: As `measure` returns it.
        samples: How many samples each round drew and trained.
    """
    cpu = {side: statistics.median(s.cpu for s in took) for side, took in seconds.items()}
    sizes = [side.split()[1] for side in cpu if side.startswith("sample")]
    found: list[list[str]] = []
    for size in sizes:
        cells = [size]
        for part in ("sample", "update"):
            least = min(cpu[f"{part} {each}"] for each in sizes)
            took = cpu[f"{part} {size}"]
            cells.append(f"{1000 * took / samples:.0f} ms ({took / least:.2f})")
        found.append(cells)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        arguments: Of the command line, by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    batch = Batch(_config(given.samples, "1"))
    seconds = measure(batch, given.rounds)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        f"{given.samples} samples; medians of {given.rounds} rounds, CPU time of one thread per "
        "sample; in brackets, as a multiple of the least\n"
    )
    print(table(["images or items in a forward", "sampling", "update"], rows(seconds, batch.size)))
    found = BatchSearch(batch.policy).sizes(_config(given.samples, "auto"))
    print(f"\nauto: {found.message}")
    write_json(given.json, "batch_sizes", seconds, samples=given.samples, auto=found.message)


def _config(samples: int, size: str) -> RunConfig:
    settings = [
        f"rollouts.samples_per_epoch={samples}",
        f"rollouts.shard_size={samples}",
        f"numerics.sample_batch_size={size}",
        f"numerics.micro_batch_size={size}",
        "numerics.threads=1",
        "algorithm.updates_per_epoch=1",
    ]
    return read_config("configs/starter.yaml", settings)


if __name__ == "__main__":
    main()
