"""Speed, memory and rounding of sampling and updates on a GPU: ``python -m bench.gpu``.

Needs torch, diffusers, transformers, peft, safetensors and this library, and downloads nothing:
models have the published architectures and random weights. Writes ``gpu.json``, with the machine's
description, and ``gpu.md``, a table. ``--device cpu --tiny`` runs the same on a machine without a
GPU, where the figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.gpu_epochs import Case, Model, check_resume, count_flops, matrix_ceiling, measure
from bench.random_models import FAMILIES, write_random

_GIB = 2**30


def machine(device: str) -> dict[str, Any]:
    """Describe this machine, as far as figures depend on it."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "peft")
        },
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def cases_of(given: argparse.Namespace, family: str) -> Iterator[Case]:
    """Return the cases of a family: all combinations of what was asked for."""
    switches = {"off": False, "on": True}
    for batch, dtype, *options, tf32 in itertools.product(
        given.batch,
        given.dtype,
        given.compile,
        given.checkpointing,
        given.offloading,
        given.tf32,
    ):
        compiled, checkpointing, offloading = (switches[option] for option in options)
        if compiled and offloading:  # refused together
            continue
        if tf32 == given.tf32[0] or dtype == "float32":  # which rounds float32 alone
            rounded = switches[tf32] and given.device == "cuda"
            yield Case(family, batch, dtype, compiled, checkpointing, offloading, rounded)


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything that was asked for.

    Args:
        given: The command's options.
        folder: Where models are written, one at a time.

    Returns:
        The machine, its ceilings in TFLOP/s, and a row for each case.
    """
    size = 256 if given.tiny else 8192
    ceilings: dict[str, float] = {}
    rows, resumed = [], []
    for family in given.families:
        path = write_random(
            family, folder / family, tiny=given.tiny, device=given.device, blocks=given.blocks
        )
        model = Model(path, family, given.device, given.tiny, given.resolution, given.steps)
        flops = count_flops(model)
        for case in cases_of(given, family):
            kind = f"{case.dtype}, TF32" if case.tf32 and case.dtype == "float32" else case.dtype
            if kind not in ceilings:
                ceilings[kind] = matrix_ceiling(given.device, case.dtype, tf32=case.tf32, size=size)
            row = {**measure(model, case, given.rounds, flops), "ceiling_tflops": ceilings[kind]}
            rows.append(row)
            print(_line(row), file=sys.stderr, flush=True)
            if given.resume:
                resumed.append(check_resume(model, case))
        shutil.rmtree(path)
    return {
        "machine": machine(given.device),
        "settings": {"tiny": given.tiny, "steps": given.steps, "resolution": given.resolution},
        "ceilings_tflops": ceilings,
        "cases": rows,
        "resumed": resumed,
    }


def table(found: Mapping[str, Any]) -> str:
    """Return the cases as a Markdown table."""
    resumed = {_key(row): row for row in found["resumed"]}
    lines = [
        "| model | batch | dtype, options | images/s: sampling, update | TFLOP/s: sampling, update "
        "| of the ceiling | peak GiB: sampling, update | initial ratio - 1: p99, max "
        "| equal bytes on resume |",
        "|" + "---|" * 9,
    ]
    lines += [_line(row, resumed.get(_key(row))) for row in found["cases"]]
    return "\n".join(lines) + "\n"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in Case.__dataclass_fields__)


def _line(row: Mapping[str, Any], resumed: Mapping[str, Any] | None = None) -> str:
    options = [row["dtype"]]
    options += [name for name in ("compile", "checkpointing", "offloading") if row[name]]
    options += ["TF32"] if row["tf32"] and row["dtype"] == "float32" else []
    start = f"| {row['family']} | {row['batch']} | {', '.join(options)} | "
    if "error" in row:
        return start + f"{row['error']} |" + " |" * 5
    peaks = [row[f"{part}_peak_bytes"] / _GIB for part in ("sampling", "update")]
    ratio = row["initial_ratio_deviation"]
    old = ", recomputed" if row["recomputed_log_probs"] else ""
    equal = "" if resumed is None else resumed.get("error") or ("no", "yes")[resumed["equal"]]
    return start + (
        f"{row['sampling_images_per_s']:.3g}, {row['update_images_per_s']:.3g} | "
        f"{row['sampling_tflops']:.3g}, {row['update_tflops']:.3g} | "
        f"{row['tflops'] / row['ceiling_tflops']:.1%} of {row['ceiling_tflops']:.3g} | "
        f"{peaks[0]:.2f}, {peaks[1]:.2f} | {ratio['p99']:.1e}, {ratio['max']:.1e}{old} | {equal} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``gpu.json`` and ``gpu.md``, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["sd15"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["bfloat16"])
    for option in ("compile", "checkpointing", "offloading", "tf32"):
        default = "on" if option == "tf32" else "off"
        parser.add_argument(f"--{option}", nargs="+", choices=["off", "on"], default=[default])
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--resolution", type=int, help="pixels; by default the model's own")
    parser.add_argument("--blocks", type=int, help="of a transformer; by default the published")
    parser.add_argument("--rounds", type=int, default=3, help="epochs that are measured")
    parser.add_argument("--resume", action="store_true", help="compare bytes after a resume too")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, images of 16 px")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of gpu.json and gpu.md")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "torch finds no CUDA device on this machine, so there is nothing to measure; "
            "--device cpu --tiny only shows that the command works"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic kernels need it
    with tempfile.TemporaryDirectory() as scratch:
        found = run(given, Path(scratch))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "gpu.md").write_text(table(found))
    print(table(found), end="")


if __name__ == "__main__":
    main()
