"""What the shipped configs need of a GPU's memory, estimated: ``python -m bench.memory_table``.

Prints the tables of docs/models.md: of the configs as they are, with the smallest batches, with
activations offloaded, and of whole UNets without and with moments in 8 bits.
Nothing is downloaded, and no GPU is needed: the models are the published shapes of
`bench/published.py`. With names as arguments, only those models.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.published import write_outline
from ddpo.config import LoraConfig, NumericsConfig
from ddpo.config.files import read_config
from ddpo.memory.advice import Fit, check_fit
from ddpo.memory.estimate import estimate
from ddpo.models.numerics import Numerics, resolve_numerics
from ddpo.prompts import load_prompts

ROWS = (
    ("Stable Diffusion 1.5", "configs/sd14_aesthetic_lora.yaml", 512),
    ("Stable Diffusion XL", "configs/sdxl_aesthetic_lora.yaml", 1024),
    ("Stable Diffusion 3.5 Medium", "configs/sd35_pickscore_lora.yaml", 512),
    ("Stable Diffusion 3.5 Medium", "configs/sd35_pickscore_lora.yaml", 1024),
    ("FLUX.1-dev", "configs/flux_pickscore_lora.yaml", 512),
    ("FLUX.1-dev", "configs/flux_pickscore_lora.yaml", 1024),
)
SMALLEST_ROWS = (
    ("Stable Diffusion 1.5", "configs/sd14_aesthetic_lora.yaml", 512),
    ("Stable Diffusion 1.5", "configs/sd14_compressibility_full.yaml", 512),
    ("Stable Diffusion XL", "configs/sdxl_aesthetic_lora.yaml", 1024),
)
SMALLEST = (
    "numerics.sample_batch_size=1",
    "numerics.micro_batch_size=1",
    "numerics.gradient_checkpointing=true",
)
"""Settings with which a config needs the least memory and computes the same, up to rounding."""
WHOLE_ROWS = (
    ("Stable Diffusion 1.5", "configs/sd14_compressibility_full.yaml", 512),
    ("Stable Diffusion XL", "configs/sd14_compressibility_full.yaml", 1024),
)
OFFLOADED_ROWS = (SMALLEST_ROWS[0], SMALLEST_ROWS[2])
OFFLOADED = (
    "numerics.sample_batch_size=1",
    "numerics.micro_batch_size=4",
    "numerics.gradient_checkpointing=false",
    "numerics.offload_activations=true",
)
"""Activations in the host's memory, and none recomputed."""
GIB = 2**30
CARDS = (24, 80)
SMALL_CARDS = (10, 24)
RESERVED = 1
"""GiB of a card that the CUDA context and kernels take."""


def row(
    name: str,
    config_file: str,
    side: int,
    changes: Sequence[str] = (),
    cards: Sequence[int] = CARDS,
) -> str:
    """Return a row of the table.

    Args:
        name: A published model.
        config_file: A shipped config of its family.
        side: Width and height of its images in pixels.
        changes: Settings to change, as ``a.b=value``.
        cards: GB of the GPUs that it may fit into.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write_outline(name, Path(folder))
        settings = [f"model.path={path}", "model.revision=null", f"model.resolution={side}"]
        config = read_config(config_file, [*settings, *changes], {})
        numerics = _on_a_gpu(config.numerics)
        prompts = len(load_prompts(config.prompts.name, config.prompts.parameters))
        needs = estimate(config, numerics, prompts=prompts)
        fits = [
            check_fit(config, numerics, (card - RESERVED) * GIB, prompts=prompts, needs=needs)
            for card in cards
        ]
    weights = needs.frozen + needs.trained
    sizes = [weights, *(needs.peaks[phase] for phase in ("encode", "sample", "decode", "update"))]
    cells = [name, f"`{Path(config_file).name}`", str(side)]
    cells += [f"{size / GIB:.1f}" for size in sizes] + [_verdict(fit) for fit in fits]
    return f"| {' | '.join(cells)} |"


def _on_a_gpu(config: NumericsConfig) -> Numerics:
    here = resolve_numerics(config.changed(device="cpu", offload_activations=False))
    there = {"device": "cuda", "dtype": "bfloat16"}
    there |= {"offload_activations": config.offload_activations}
    return Numerics.model_validate({**dict(here), **there})


def _verdict(fit: Fit) -> str:
    if fit.fits:
        return "as it is"
    if fit.then.peak > fit.free:
        return f"no ({fit.then.peak / GIB:.1f})"
    short = {k.rpartition(".")[2]: v for k, v in fit.settings.items()}
    shown = {k: "{type: lora}" if isinstance(v, LoraConfig) else v for k, v in short.items()}
    settings = ", ".join(f"`{k}: {v}`" for k, v in shown.items())
    return f"{settings} ({fit.then.peak / GIB:.1f})"


def main() -> None:
    """Print the tables."""
    wanted = sys.argv[1:] or [name for name, *_ in ROWS]
    tables = (
        (ROWS, (), CARDS),
        (SMALLEST_ROWS, SMALLEST, SMALL_CARDS),
        (OFFLOADED_ROWS, OFFLOADED, SMALL_CARDS),
        (WHOLE_ROWS, SMALLEST, CARDS),
        (WHOLE_ROWS, (*SMALLEST, "optimizer.eight_bit=true"), CARDS),
    )
    for rows, changes, cards in tables:
        head = ["model", "config", "px", "weights", "encode", "sample", "decode", "update"]
        head += [f"{card} GB" for card in cards]
        print(f"\n{' '.join(changes)}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for each in rows:
            if each[0] in wanted:
                began = time.process_time()
                print(row(*each, changes, cards), flush=True)
                print(f"{each[0]}: {time.process_time() - began:.0f} s of CPU", file=sys.stderr)


if __name__ == "__main__":
    main()
