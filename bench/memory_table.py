"""What the shipped configs need of a GPU's memory, estimated: ``python -m bench.memory_table``.

Prints the table of docs/models.md. Nothing is downloaded, and no GPU is needed: the models are the
published shapes of `bench/published.py`. With names as arguments, only those models.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from bench.published import write_outline
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
GIB = 2**30
CARDS = (24, 80)
RESERVED = 1
"""GiB of a card that the CUDA context and kernels take."""


def row(name: str, config_file: str, side: int) -> str:
    """Return a row of the table.

    Args:
        name: A published model.
        config_file: A shipped config of its family.
        side: Width and height of its images in pixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write_outline(name, Path(folder))
        settings = [f"model.path={path}", "model.revision=null", f"model.resolution={side}"]
        config = read_config(config_file, settings, {})
        numerics = _on_a_gpu(resolve_numerics(config.numerics.changed(device="cpu")))
        prompts = len(load_prompts(config.prompts.name, config.prompts.parameters))
        needs = estimate(config, numerics, prompts=prompts)
        fits = [
            check_fit(config, numerics, (card - RESERVED) * GIB, prompts=prompts, needs=needs)
            for card in CARDS
        ]
    weights = needs.frozen + needs.trained
    sizes = [weights, *(needs.peaks[phase] for phase in ("encode", "sample", "decode", "update"))]
    cells = [name, f"`{Path(config_file).name}`", str(side)]
    cells += [f"{size / GIB:.1f}" for size in sizes] + [_verdict(fit) for fit in fits]
    return f"| {' | '.join(cells)} |"


def _on_a_gpu(numerics: Numerics) -> Numerics:
    return Numerics.model_validate({**dict(numerics), "device": "cuda", "dtype": "bfloat16"})


def _verdict(fit: Fit) -> str:
    if fit.fits:
        return "as it is"
    if fit.then.peak > fit.free:
        return f"no ({fit.then.peak / GIB:.1f})"
    settings = ", ".join(f"`{k.rpartition('.')[2]}: {v}`" for k, v in fit.settings.items())
    return f"{settings} ({fit.then.peak / GIB:.1f})"


def main() -> None:
    """Print the table."""
    cards = [f"{card} GB" for card in CARDS]
    head = ["model", "config", "px", "weights", "encode", "sample", "decode", "update", *cards]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    wanted = sys.argv[1:] or [name for name, *_ in ROWS]
    for each in ROWS:
        if each[0] in wanted:
            began = time.process_time()
            print(row(*each), flush=True)
            print(f"{each[0]}: {time.process_time() - began:.0f} s of CPU", file=sys.stderr)


if __name__ == "__main__":
    main()
