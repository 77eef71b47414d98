"""Peak memory of sampling, update and a whole epoch: ``python -m bench.peaks``.

The library draws and trains the demo's samples (`configs/starter.yaml`), and so does a bare loop:
the forwards, decoder and backwards of `bench/floor.py`, which keeps no trajectory of its own. Each
runs in a process of its own, with the model loaded and samples to train on read from a file. What
is measured is the process's resident memory (RSS): what it is before the work, and its highest
during it. On a GPU also the most bytes that PyTorch has allocated there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from bench.floor import Batch
from bench.report import machine, table, write_record
from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.diffusion.sampling import Trajectories

Side = Literal["library", "bare loop"]
SIDES: tuple[Side, ...] = ("library", "bare loop")
PARTS = ("sampling", "update", "epoch")
"""Of one shard, but the epoch, which is the preset's."""


def work_of(batch: Batch, part: str, side: Side) -> Callable[[], object]:
    """Return what one process does while it is measured.

    Args:
        batch: The samples.
        part: One of :data:`PARTS`.
        side: Who does it.
    """
    library = {"sampling": batch.sample, "update": batch.update, "epoch": batch.epoch}
    bare = {
        "sampling": batch.bare_sampling,
        "update": batch.bare_backwards,
        "epoch": lambda: (batch.bare_sampling(), batch.bare_backwards()),
    }
    return (library if side == "library" else bare)[part]


def measured(work: Callable[[], object], device: str) -> dict[str, float]:
    """Do a piece of work, and return the memory that it takes, in MB.

    Args:
        work: The work.
        device: Kind of device that it computes on.

    Returns:
        ``before`` and ``peak``: resident memory; on CUDA also ``allocated``, the peak there.
    """
    before = _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    work()
    found = {"before": before, "peak": _status_mb("VmHWM")}
    if device == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated() / 1e6
    return found


def rows(peaks: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the table's rows: each side's memory before and at its highest, and their ratio.

    Args:
        peaks: What was measured, by part and side: ``sampling, library``.
    """
    found: list[list[str]] = []
    for part in PARTS:
        ours, bare = (peaks[f"{part}, {side}"] for side in SIDES)
        cells = [_cell(each) for each in (ours, bare)]
        found.append([part, *cells, f"{ours['peak'] / bare['peak']:.2f}"])
        if "allocated" in ours:
            on_gpu = [f"{each['allocated']:.0f} MB" for each in (ours, bare)]
            ratio = ours["allocated"] / bare["allocated"]
            found.append([f"{part}, on the GPU", *on_gpu, f"{ratio:.2f}"])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each part by both sides and print a table.

    Args:
        arguments: Of the command line, by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    config = read_config("configs/starter.yaml", ["numerics.threads=1", *given.set])
    if given.part:
        batch = Batch(_of_part(config, given.part), _read(given.samples))
        found = measured(work_of(batch, given.part, given.side), batch.policy.numerics.device)
        print(json.dumps(found))
        return
    changes = [word for change in given.set for word in ("--set", change)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.safetensors"
        _write(Batch(_of_part(config, "sampling")), file)
        peaks: dict[str, dict[str, float]] = {}
        for part in PARTS:
            for side in SIDES:
                words = ["--part", part, "--side", side, "--samples", str(file), *changes]
                command = [sys.executable, "-m", "bench.peaks", *words]
                told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                peaks[f"{part}, {side}"] = json.loads(told.stdout.splitlines()[-1])
                print(f"{part}, {side}: {peaks[f'{part}, {side}']}", flush=True)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        f"sampling and update of {config.rollouts.shard_size} samples, an epoch of "
        f"{config.rollouts.samples_per_epoch}; resident memory at its highest (and above what it "
        "was before)\n"
    )
    print(table(["", *SIDES, "ratio"], rows(peaks)))
    settings = config.model_dump(mode="json", include={"rollouts", "sampler", "numerics"})
    write_record(given.json, "peaks", settings, megabytes=peaks)


def _cell(found: Mapping[str, float]) -> str:
    return f"{found['peak']:.0f} MB (+{found['peak'] - found['before']:.0f})"


def _of_part(config: RunConfig, part: str) -> RunConfig:
    if part == "epoch":
        return config
    rollouts = config.rollouts.changed(samples_per_epoch=config.rollouts.shard_size)
    algorithm = config.algorithm.changed(updates_per_epoch=1)
    return config.changed(rollouts=rollouts, algorithm=algorithm)


def _write(batch: Batch, file: Path) -> None:
    tensors = {"latents": batch.rollouts.latents, "log_probs": batch.rollouts.log_probs}
    save_file({**tensors, "times": torch.tensor(batch.times)}, file)


def _read(file: Path) -> Trajectories:
    tensors = load_file(file)
    return Trajectories(tensors["latents"], tensors["log_probs"], tensors["times"], [])


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1000


if __name__ == "__main__":
    main()
